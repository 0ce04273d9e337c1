"""A named bit layout over uint64: declare fields once, then pack, unpack and describe scalars and whole arrays alike.

Page-fault error codes, exit qualifications and page-table entries are all 64-bit words whose bits have names.
Chapter 2 makes its first layout by hand; :mod:`mmu.pfec` declares the real ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 64
_TOP = (1 << WORD_BITS) - 1
_HEXADECIMAL = re.compile(r"(0[xX])?[0-9a-fA-F]+")

Word = int | np.integer | NDArray[np.integer]


def as_words(value: Any, what: str = "value") -> NDArray[np.uint64]:
    """Return ``value`` as a uint64 array of the same shape (a scalar becomes shape ``()``).

    Raises:
        TypeError: ``value`` does not consist of integers (bool included: a flag is not a word).
        ValueError: an integer is negative or needs more than 64 bits; the message names it.

    >>> as_words(0x625ae65)
    array(103132773, dtype=uint64)
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= _TOP:
            raise ValueError(f"{what} is {value:#x}; expected an unsigned 64-bit word, 0 to {_TOP:#x}")
        return np.asarray(value, dtype=np.uint64)
    if isinstance(value, np.ndarray | np.integer):
        array = np.asarray(value)
    elif isinstance(value, bool | float | complex | str | bytes) or value is None:
        raise TypeError(f"{what} is {value!r}; expected integers")
    else:  # a list that mixes small and huge ints would turn into floats: convert each int by itself
        exact = np.asarray(value, dtype=object)
        for word in exact.flat:
            as_words(word, what)
        return exact.astype(np.uint64)
    if array.dtype == np.uint64:
        return array
    if array.dtype.kind not in "iu":
        raise TypeError(f"{what} has dtype {array.dtype}; expected integers, for example numpy.uint64")
    if array.dtype.kind == "i" and array.size and array.min() < 0:
        raise ValueError(f"{what} holds {int(array.min())}; expected unsigned 64-bit words, so nothing below 0")
    return array.astype(np.uint64)


def hexadecimal(text: str) -> int:
    """The 64-bit word that a hexadecimal number stands for, ``0x`` optional.

    Raises:
        ValueError: it is no such number; the message names it.

    >>> hexadecimal("0x1AA"), hexadecimal("1aa")
    (426, 426)
    """
    digits = text.strip()
    # int(text, 16) alone would take "1_0", "+1" and other scripts' digits
    if not _HEXADECIMAL.fullmatch(digits) or int(digits, 16) > _TOP:
        raise ValueError(f"{text!r} is no 64-bit hexadecimal number; expected for example 0x1aa")
    return int(digits, 16)


def like(value: Any, words: NDArray[Any]) -> Any:
    """Return ``words`` as a plain Python scalar where ``value`` was a scalar, else as the array it is."""
    return words.item() if np.ndim(value) == 0 and not isinstance(value, np.ndarray) else words


@dataclass(frozen=True)
class Field:
    """``width`` adjacent bits of a word, the lowest at position ``low``, with what they mean in a few words."""

    name: str
    low: int
    width: int = 1
    meaning: str = ""

    @property
    def top(self) -> int:
        """Position of the field's highest bit."""
        return self.low + self.width - 1

    @property
    def mask(self) -> int:
        """The field's bits, in place.

        >>> hex(Field("PFN", 12, 40).mask)
        '0xffffffffff000'
        """
        return ((1 << self.width) - 1) << self.low

    @property
    def where(self) -> str:
        """``"bit 3"`` or ``"bits 12 to 51"``."""
        return f"bit {self.low}" if self.width == 1 else f"bits {self.low} to {self.top}"


class Layout(Mapping[str, Field]):
    """The named fields of one kind of 64-bit word; a mapping from a field's name to its :class:`Field`.

    Args:
        name: what the word is, as error messages shall call it.
        fields: in any order; bits that no field covers are allowed and are reported by :meth:`unnamed`.
        source: where the positions were read.

    Raises:
        ValueError: two fields share a bit or a name, or a field is empty or leaves the word; both culprits are named.

    >>> demo = Layout("demo word", Field("P", 0), Field("W", 1), Field("PFN", 12, 40))
    >>> hex(demo.pack(P=1, PFN=0x1234))
    '0x1234001'
    >>> demo.unpack(0x1234001)
    {'P': 1, 'W': 0, 'PFN': 4660}
    >>> demo.text(0x1234003)
    'P|W|PFN=0x1234'
    """

    def __init__(self, name: str, *fields: Field, source: str = "") -> None:
        self.name, self.source = name, source
        self._fields: dict[str, Field] = {}
        owner: dict[int, Field] = {}
        for field in fields:
            if field.width < 1 or field.low < 0 or field.top >= WORD_BITS:
                raise ValueError(
                    f"{name}: field {field.name} takes bits {field.low} to {field.top}; "
                    f"expected at least one bit, all within 0 to {WORD_BITS - 1}"
                )
            if field.name in self._fields:
                raise ValueError(f"{name}: two fields are called {field.name}; expected each name once")
            for bit in range(field.low, field.top + 1):
                if bit in owner:
                    raise ValueError(f"{name}: fields {owner[bit].name} and {field.name} overlap at bit {bit}")
                owner[bit] = field
            self._fields[field.name] = field

    def __getitem__(self, name: str) -> Field:
        try:
            return self._fields[name]
        except KeyError:
            raise KeyError(f"{self.name} has no field {name!r}; it has {', '.join(self._fields)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Layout({self.name}: {', '.join(self)})"

    def mask(self, *names: str) -> int:
        """The bits of the named fields, in place; of all fields when none is named.

        >>> Layout("demo", Field("P", 0), Field("W", 1)).mask()
        3
        """
        return sum(self[name].mask for name in names or self)

    def pack(self, **values: Word) -> Any:
        """Build words from fields; fields that are not named are 0, arrays broadcast together.

        Returns an int when every value is a scalar, else a uint64 array.

        Raises:
            KeyError: no such field.
            ValueError: a value does not fit its field; the message gives the largest that does.
        """
        word = np.zeros((), dtype=np.uint64)
        for name, value in values.items():
            field = self[name]
            part = as_words(np.asarray(value, dtype=np.uint64) if isinstance(value, bool) else value, name)
            limit = field.mask >> field.low
            if part.size and int(part.max()) > limit:
                raise ValueError(
                    f"{self.name}: {name} is {int(part.max()):#x}; its {field.width} bits hold at most {limit:#x}"
                )
            word = word | part << np.uint64(field.low)
        return word.item() if word.ndim == 0 and not any(isinstance(v, np.ndarray) for v in values.values()) else word

    def field(self, word: Word, name: str) -> Any:
        """The value of one field of each word: an int for a scalar, else a uint64 array of the same shape."""
        field = self[name]
        return like(word, (as_words(word, self.name) & np.uint64(field.mask)) >> np.uint64(field.low))

    def unpack(self, word: Word) -> dict[str, Any]:
        """Every field's value, in the order in which they were declared."""
        words = as_words(word, self.name)
        return {name: like(word, self.field(words, name)) for name in self}

    def unnamed(self, word: Word) -> Any:
        """The bits of each word that no field covers, in place: what a decoder must not pass over in silence.

        >>> hex(Layout("demo", Field("P", 0)).unnamed(0x11))
        '0x10'
        """
        return like(word, as_words(word, self.name) & np.uint64(_TOP ^ self.mask()))

    def text(self, word: int) -> str:
        """The set fields of one word in the kernel's manner, joined by ``|``: ``P|W|PFN=0x1234``.

        Bits without a name come last, as one hexadecimal number; a word without any set bit is ``0``.

        >>> Layout("demo", Field("P", 0)).text(0x11)
        'P|0x10'
        """
        fields = {name: value for name, value in self.unpack(int(word)).items() if value}
        parts = [name if self[name].width == 1 else f"{name}={value:#x}" for name, value in fields.items()]
        rest = self.unnamed(int(word))
        return "|".join(parts + ([f"{rest:#x}"] if rest else [])) or "0"

    def parse(self, text: str) -> int:
        """Turn ``P|W|0x100000000`` or a hexadecimal number (``0x`` optional) back into a word.

        A part that is a field's name is that field, whatever its letters say in hexadecimal: ``F`` is not 15.

        Raises:
            ValueError: a part is neither a single-bit field nor a hexadecimal number, or the number leaves 64 bits.

        >>> demo = Layout("demo", Field("P", 0), Field("W", 1))
        >>> demo.parse("W|0x10"), demo.parse("7"), demo.parse("")
        (18, 7, 0)
        """
        word = 0
        for part in text.split("|") if text.strip() else ():
            part = part.strip()
            if part in self._fields and self[part].width == 1:
                word |= self[part].mask
                continue
            if not _HEXADECIMAL.fullmatch(part):
                flags = "|".join(name for name in self if self[name].width == 1)
                raise ValueError(f"{self.name}: {part!r} is neither a flag ({flags}) nor a hexadecimal number")
            word |= int(as_words(int(part, 16), self.name))
        return word
