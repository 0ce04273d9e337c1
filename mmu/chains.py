"""Rules on the history of each spte: what an event finds there is what the events before it left.

The one idea: sort all changes by their spte, and hold the old value of each against what the one before left. In the
TDP MMU every change is printed, so the two are the same but for what needs no event: the CPU's A and D, the release of
a removed entry, the entries that a split makes. In the other MMUs whatever takes rights away is silent, but a leaf
appears, moves or gains rights only by a set or a fast fix, which are printed. Chapter 13.

A fast path's event is printed after its cmpxchg, and another CPU's change may be printed in between: two neighbours of
different tasks may stand in either order, and what a fast path saw may be what either of its neighbours left.

Facts: Linux 6.1 ``mmu/tdp_mmu.c``, ``mmu/mmu.c`` (facts 2.4 and 2.6); that only these changes are silent was read
there, and no recorded trace has another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import histories, spte, trace, update, values
from mmu.histories import FAST, MARK, SET, TDP, UNNAMED
from mmu.ledger import Ledger, Rule
from mmu.scan import MISSING
from mmu.spte import FROZEN, NON_LEAF, NONE, REMOVED, SpteLayout

Words = NDArray[np.uint64]
Lines = NDArray[np.int64]
Bools = NDArray[np.bool_]

_EACH = "Linux 6.1 tdp_mmu.c, handle_changed_spte: every change is printed"
LINK = Rule("an entry of the TDP MMU changes from what its last event left", _EACH, "layout, history")
UNSET = Rule(
    "a leaf appears, moves or gains rights only by a set, a fast fix or a split",
    "Linux 6.1 mmu.c, mmu_set_spte and fast_page_fault",
    "layout, history",
)
SEEN = Rule("the fast path finds what the entry's events left", "Linux 6.1 mmu.c, fast_page_fault", "layout, history")
TAKEN = Rule("when a fast fix is gone again at once, an event tells who undid it", _EACH, "layout, history")
MOVED = Rule(
    "a table stays where it is", "Linux 6.1 mmu.c, kvm_mmu_get_page: a new place is a new page", "layout, history"
)
RULES = (LINK, UNSET, SEEN, TAKEN, MOVED)

KNOWN = 1 << 20  # sptes whose last change is remembered
HELD = 64  # lines at the end of a piece whose changes wait for what may stand out of order behind them
CLOSE = 100_000_000  # ns: an event is printed no later than this after its change (chosen; 16 ms were seen recorded)
EPOCH = np.uint64(58)  # bits 58 to 60 of a name; they tell histories apart that a new root or a loss separates
_NO = np.uint64(MISSING)
_ORDERS = [(2, [1, 0]), (3, [1, 2, 0]), (3, [2, 0, 1]), (3, [2, 1, 0])]  # in which neighbours may really have come

_STATE = np.dtype(
    [
        ("key", np.uint64),
        ("epoch", np.int64),
        ("line", np.int64),
        ("pid", np.int32),
        ("old", np.uint64),  # what the last change found; MISSING: it does not say
        ("left", np.uint64),  # what it left
        ("gfn", np.uint64),
    ]
)

_PLACE = np.dtype([("key", np.uint64), ("epoch", np.int64), ("line", np.int64), ("frame", np.uint64)])


class Chains:
    """Every spte's history; :meth:`add` the changes of each piece, then :meth:`finish`.

    Attributes:
        names: gave the changes their sptes' names.
        fast_printed: the trace has fast path's events at all; without them W may come unseen.
    """

    def __init__(self, ledger: Ledger, form: SpteLayout, names: histories.Names, *, fast_printed: bool) -> None:
        self.ledger, self.form, self.names, self.fast_printed = ledger, form, names, fast_printed
        self._table = np.zeros(0, dtype=_STATE)  # (spte,) by key
        self._held = np.zeros(0, dtype=[*histories.CHANGE.descr, ("epoch", np.int64)])
        self._splits = np.zeros(0, dtype=[("key", np.uint64), ("line", np.int64)])  # by parent, newest
        self._places = np.zeros(0, dtype=_PLACE)  # of each table, the newest
        self._made = np.zeros(0, dtype=_PLACE)  # when a table was made anew
        self._excuses = np.zeros(0, dtype=np.int64)  # lines after which an entry may have changed without an event
        self._placed = 0  # the last line whose place was judged
        bits = form.bits
        self._w, self._host, self._pfn = (np.uint64(bits.mask(name)) for name in ("W", "HOST_W", "PFN"))
        self._used = np.uint64(sum(bits.mask(name) for name in ("A", "D") if name in bits))
        self._d = np.uint64(bits.mask("D") if "D" in bits else 0)
        self._rights = np.uint64(sum(bits.mask(name) for name in ("W", "MMU_W") if name in bits))

    def add(self, piece: trace.Trace, rows: NDArray[Any], epoch: Lines) -> None:
        """Judge the changes of one piece.

        Args:
            piece: the piece, for the events after which entries change silently.
            rows: its :data:`mmu.histories.CHANGE` records, as ``names`` gives them.
            epoch: ``# (change,)`` changes of different epochs are of different histories.
        """
        fresh = np.zeros(len(rows), dtype=self._held.dtype)
        for name in rows.dtype.names:
            fresh[name] = rows[name]
        fresh["epoch"] = epoch
        self._judge_places(piece, fresh)
        fresh = fresh[~rows["restated"] & (rows["key"] != UNNAMED)]
        excuses = [piece[name]["line"] for name in ("kvm_set_spte_hva", "kvm_mmu_split_huge_page")]
        self._excuses = np.sort(np.concatenate([self._excuses[-1:], *excuses]))
        every = np.concatenate([self._held, fresh])
        every["key"] = self.names.joined(every["key"])
        end = max((int(piece[name]["line"][-1]) for name in piece), default=0) - HELD
        ready = every["line"] <= end
        self._held = every[~ready]
        self._judge(every[ready])

    def finish(self) -> None:
        """Judge what was held back."""
        self._judge(self._held)

    # The silent changes ----------------------------------------------------------------------------------------------

    def _nothing(self, words: Words) -> Bools:
        return np.isin(values.states(words, self.form, None), (NONE, REMOVED, FROZEN))

    def _quiet(self, left: Words, old: Words) -> Bools:
        """Whether an entry of the TDP MMU may become ``old`` without an event after one left ``left``."""
        gained, gone = old & ~left, left & ~old
        used = (gained & ~self._used == 0) & (gone == 0) & ((gained & self._d == 0) | (old & self._w != 0))
        if not self.fast_printed:
            restored = update.restore(left, self.form) if "SAVED_R" in self.form.bits else left
            repaired, lost = old & ~restored, restored & ~old
            used |= (repaired & ~self._used & ~self._w == 0) & (lost == 0)
        return (left == old) | (self._nothing(left) & self._nothing(old)) | used

    def _silent(self, left: Words, old: Words) -> Bools:
        """The same outside the TDP MMU, where what takes rights away prints nothing."""
        there = spte.is_present(left, self.form)
        gone = ~spte.is_present(old, self.form)
        tracked = "SAVED_R" in self.form.bits
        a, b = (update.restore(word, self.form) if tracked else word for word in (left, old))
        same = ((a ^ b) & ~self._used & ~self._rights == 0) & (b & ~a & self._rights == 0)
        return gone | (there & same)

    # Judging ---------------------------------------------------------------------------------------------------------

    def _left(self, rows: NDArray[Any]) -> Words:
        """What each change left in its entry."""
        left = np.where(rows["new"] == _NO, rows["old"], rows["new"])
        fast = rows["event"] == FAST
        if fast.any():
            code = rows["code"][fast]
            fixed, outcome = update.fast_page_fault(
                rows["old"][fast], write=code & np.uint64(2) != 0, fetch=code & np.uint64(16) != 0,
                level=rows["level"][fast], logged=False, ad_bits=False, layout=self.form,
            )  # fmt: skip
            sound = rows["fixed"][fast] & 2 != 0
            left[fast] = np.where(sound & (outcome == 0), fixed, rows["old"][fast])
        mark = rows["event"] == MARK
        if mark.any():
            word = rows["code"][mark]
            left[mark] = update.make_mmio(
                rows["gfn"][mark] & np.uint64((1 << 39) - 1), access=word & np.uint64(6),
                generation=word >> np.uint64(3), layout=self.form,
            )  # fmt: skip
        return left

    def _judge(self, rows: NDArray[Any]) -> None:
        if not len(rows):
            return
        rows = rows[np.lexsort((rows["line"], rows["epoch"], rows["key"]))]
        self._remember_splits(rows)
        acts = (rows["event"] != FAST) | (rows["fixed"] & 2 != 0)
        changes = rows[acts]
        left = self._left(changes)
        before = self._before(changes, left)
        self._judge_changes(changes, left, before)
        self._judge_sights(rows[~acts], changes, left)
        self._store(changes, left)

    def _before(self, changes: NDArray[Any], left: Words) -> NDArray[Any]:
        """The state that each change was made in: of the change before it, or from the table; line 0: not known."""
        before = np.zeros(len(changes), dtype=_STATE)
        if not len(changes):
            return before
        same = (changes["key"][1:] == changes["key"][:-1]) & (changes["epoch"][1:] == changes["epoch"][:-1])
        for name in ("key", "epoch", "line", "pid", "old", "gfn"):
            before[name][1:] = changes[name][:-1]
        before["left"][1:] = left[:-1]
        first = np.flatnonzero(np.concatenate([[True], ~same]))
        before[first] = self._known(changes[first])
        return before

    def _known(self, rows: NDArray[Any]) -> NDArray[Any]:
        """What the table has of each row's spte; line 0: nothing."""
        found = np.zeros(len(rows), dtype=_STATE)
        if len(self._table):
            place = np.searchsorted(self._table["key"], rows["key"] ^ _coded(rows["epoch"]))
            place = np.minimum(place, len(self._table) - 1)
            hit = self._table["key"][place] == rows["key"] ^ _coded(rows["epoch"])
            hit &= self._table["epoch"][place] == rows["epoch"]
            found[hit] = self._table[place[hit]]
        return found

    def _fits(self, kind_tdp: Bools, left: Words, old: Words) -> Bools:
        return np.where(kind_tdp, self._quiet(left, old), self._silent(left, old))

    def _judge_changes(self, changes: NDArray[Any], left: Words, before: NDArray[Any]) -> None:
        tells = changes["old"] != _NO  # sets and marks do not say what they found
        tdp = changes["key"] >> np.uint64(61) == np.uint64(1)
        judged = tells & (before["line"] > 0) & (before["left"] != _NO)
        judged &= tdp | ((changes["event"] == FAST) & (before["gfn"] == changes["gfn"]) & ~np.bool_(self.names.tdp_mmu))
        bad = judged & ~self._fits(tdp, before["left"], changes["old"])
        if bad.any():
            bad &= ~self._reordered(changes, left, before, bad, tdp)
            where = np.flatnonzero(bad)
            bad[where[self._excused(changes[where], before[where], tdp[where])]] = False

        def say(i: int) -> str:
            return f"{_name(changes[i])}: {int(before['left'][i]):#x} was left, {int(changes['old'][i]):#x} found"

        lines = before["line"], changes["line"]
        for rule, of in ((LINK, judged & tdp), (UNSET, judged & ~tdp)):
            self.ledger.judge(rule, int(of.sum()), np.flatnonzero(bad & of), lines, say)
        self._judge_taken(changes, left, before, tdp)

    def _reordered(self, changes: NDArray[Any], left: Words, before: NDArray[Any], bad: Bools, tdp: Bools) -> Bools:
        """Which broken links are whole when two or three neighbours of different tasks are read in another order.

        Where the last of a history turns out to be an earlier one, what it ``left`` is put right.
        """
        n = len(changes)
        healed = np.zeros(n, dtype=np.bool_)
        old, key, epoch, pid = (changes[name] for name in ("old", "key", "epoch", "pid"))
        sick = np.flatnonzero(bad)
        for size, order in _ORDERS:
            for start in range(1 - size, 1):
                first = sick[~healed[sick]] + start  # (window,)
                first = first[(first >= 0) & (first + size <= n)]
                window = first[:, None] + np.arange(size, dtype=np.int64)  # (window, place)
                whole = ((key[window] == key[first][:, None]) & (epoch[window] == epoch[first][:, None])).all(axis=1)
                for a in range(size):
                    for b in range(a):
                        swapped = order.index(a) < order.index(b)
                        apart = np.abs(changes["ns"][window[:, a]] - changes["ns"][window[:, b]])
                        whole &= ~np.bool_(swapped) | ((pid[window[:, a]] != pid[window[:, b]]) & (apart <= CLOSE))
                turned = window[:, order]
                state, known = before["left"][first], before["line"][first] > 0
                for place in range(size):
                    to = turned[:, place]
                    whole &= self._linked(state, known, old[to], tdp[to])
                    state, known = left[to], np.ones(len(to), dtype=np.bool_)
                follows = np.minimum(first + size, n - 1)
                more = (first + size < n) & (key[follows] == key[first]) & (epoch[follows] == epoch[first])
                whole &= self._linked(state, more, old[follows], tdp[follows])
                healed[window[whole]] = True
                healed[follows[whole & more]] = True
                last = whole & ~more
                left[window[last, -1]] = state[last]
        return healed

    def _linked(self, state: Words, known: Bools, old: Words, tdp: Bools) -> Bools:
        return ~known | (old == _NO) | (state == _NO) | self._fits(tdp, state, old)

    def _excused(self, changes: NDArray[Any], before: NDArray[Any], tdp: Bools) -> Bools:
        """A split made the entry; or, outside the TDP MMU, the host's notifier or a split may have."""
        parent = _parent(changes)
        made = np.zeros(len(changes), dtype=np.bool_)
        if len(self._splits):
            place = np.searchsorted(self._splits["key"], parent, side="right") - 1
            hit = (place >= 0) & (self._splits["key"][place] == parent)
            made = hit & (self._splits["line"][place] > before["line"])
        quiet = np.zeros(len(changes), dtype=np.bool_)
        if len(self._excuses):
            place = np.searchsorted(self._excuses, changes["line"]) - 1
            quiet = (place >= 0) & (self._excuses[np.maximum(place, 0)] > before["line"])
        return made | (quiet & ~tdp)

    def _remember_splits(self, rows: NDArray[Any]) -> None:
        split = (rows["event"] == TDP) & (rows["level"] > 1)
        split = rows[split]
        if not len(split):
            return
        leaf = np.isin(values.states(split["old"], self.form, split["level"]), spte.LEAVES)
        table = values.states(split["new"], self.form, split["level"]) == NON_LEAF
        split = split[leaf & table]
        both = np.zeros(len(split), dtype=self._splits.dtype)
        both["key"], both["line"] = split["key"], split["line"]
        both = np.concatenate([self._splits, both])[-KNOWN // 16 :]
        self._splits = both[np.lexsort((both["line"], both["key"]))]

    def _judge_taken(self, changes: NDArray[Any], left: Words, before: NDArray[Any], tdp: Bools) -> None:
        """In the TDP MMU, ``new`` of a fixed fault is what it wrote, or what a neighbour of the chain made of it."""
        fixed = (changes["event"] == FAST) & tdp
        lacks = np.flatnonzero(fixed & ((changes["new"] ^ left) & ~self._used != 0))
        n = len(changes)
        told = np.zeros(len(lacks), dtype=np.bool_)
        for step in (-2, -1, 1, 2, 3):
            near = np.clip(lacks + step, 0, n - 1)
            state = before["left"][near]  # a change that stands before it came behind it, if it fits there
            fits = np.bool_(step > 0) | self._linked(state, before["line"][near] > 0, changes["old"][lacks], tdp[lacks])
            fits &= (changes["key"][near] == changes["key"][lacks]) & (changes["event"][near] == TDP)
            fits &= (changes["new"][near] ^ changes["new"][lacks]) & ~self._used == 0
            fits &= changes["pid"][near] != changes["pid"][lacks]
            told |= fits
        self.ledger.judge(TAKEN, int(fixed.sum()), lacks[~told], (changes["line"],), lambda i: _name(changes[i]))

    def _judge_sights(self, sights: NDArray[Any], changes: NDArray[Any], left: Words) -> None:
        """What a fast path found when it changed nothing: what a change near it left, or found."""
        sights = sights[np.bool_(not self.names.tdp_mmu) | (sights["key"] >> np.uint64(61) == np.uint64(1))]
        if not len(sights):
            return
        tdp = sights["key"] >> np.uint64(61) == np.uint64(1)
        known = self._known(sights)
        # The changes are sorted by key, epoch, line; so is the place of a sight among them.
        ranks = np.concatenate([changes[["key", "epoch", "line"]], sights[["key", "epoch", "line"]]])
        order = np.lexsort((ranks["line"], ranks["epoch"], ranks["key"]))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.cumsum(order < len(changes)) - 1
        last = rank[len(changes) :]  # the change before each sight, -1: none
        fits = np.zeros(len(sights), dtype=np.bool_)
        seen = np.zeros(len(sights), dtype=np.bool_)  # there is something to hold it against
        where = np.zeros(len(sights), dtype=np.int64)
        word = np.full(len(sights), _NO, dtype=np.uint64)
        for step, name, always in (
            (0, "left", True),
            (0, "old", False),
            (1, "old", True),
            (1, "left", False),
            (2, "left", False),
        ):
            place = last + step
            real = (place >= 0) & (place < len(changes))
            if not real.any():
                continue
            place = np.clip(place, 0, len(changes) - 1)
            real &= (changes["key"][place] == sights["key"]) & (changes["epoch"][place] == sights["epoch"])
            state = left[place] if name == "left" else changes["old"][place]
            usable = real & (state != _NO) & (np.bool_(always) | (changes["pid"][place] != sights["pid"]))
            fits |= usable & self._fits(tdp, state, sights["old"])
            if (step, name) == (0, "left"):
                seen |= usable
                where[real], word[real] = changes["line"][place][real], state[real]
                fits |= real & ~tdp & (changes["gfn"][place] != sights["gfn"])
        table = (where == 0) & (known["line"] > 0) & (known["left"] != _NO)
        seen |= table
        where[table], word[table] = known["line"][table], known["left"][table]
        fits |= table & self._fits(tdp, known["left"], sights["old"])
        fits |= (
            table
            & (known["old"] != _NO)
            & (known["pid"] != sights["pid"])
            & self._fits(tdp, known["old"], sights["old"])
        )
        fits |= table & ~tdp & (known["gfn"] != sights["gfn"])
        bad = np.flatnonzero(seen & ~fits)
        state = np.zeros(len(bad), dtype=_STATE)
        state["line"] = where[bad]
        bad = bad[~self._excused(sights[bad], state, tdp[bad])]

        def say(i: int) -> str:
            return f"{_name(sights[i])}: {int(word[i]):#x} was left, {int(sights['old'][i]):#x} found"

        self.ledger.judge(SEEN, int(seen.sum()), bad, (where, sights["line"]), say)

    def _judge_places(self, piece: trace.Trace, rows: NDArray[Any]) -> None:
        """Entries of one table lie in one page, until the table is made anew; direct tables, whose gfns tell them."""
        sets = rows["restated"] & (rows["event"] != FAST) & (rows["at"] != _NO)
        fast = (rows["event"] == FAST) & histories.unhashed(rows["sptep"]) & np.bool_(self.names.offset is not None)
        marks = rows["restated"] & (rows["event"] == MARK) & histories.unhashed(rows["sptep"])
        marks &= np.bool_(self.names.offset is not None)
        of = rows[sets | marks | (fast & np.bool_(not self.names.spaces))]
        made = piece["kvm_mmu_get_page"]
        made = made[made["level"] > 0]
        new = np.zeros(len(made), dtype=_PLACE)
        new["key"] = histories.key_of_gfn(np.zeros(len(made), dtype=np.int64), made["level"], made["gfn"])
        new["line"] = made["line"]
        self._made = np.concatenate([self._made, new])[-KNOWN // 16 :]
        seen = np.zeros(len(of), dtype=_PLACE)
        covers = np.uint64(9) * np.clip(of["level"], 1, 5).astype(np.uint64)
        gfn = of["gfn"] >> covers << covers
        seen["key"] = histories.key_of_gfn(np.zeros(len(of), dtype=np.int64), of["level"], gfn)
        where = np.where(of["event"] == SET, of["at"], of["sptep"] - np.uint64(self.names.offset or 0))
        seen["epoch"], seen["line"], seen["frame"] = of["epoch"], of["line"], where >> np.uint64(12)
        every = np.concatenate([self._places, seen])
        every = every[np.lexsort((every["line"], every["key"]))]
        a, b = every[:-1], every[1:]
        judged = (a["key"] == b["key"]) & (a["epoch"] == b["epoch"]) & (b["line"] > self._placed)
        bad = np.flatnonzero(judged & (a["frame"] != b["frame"]))
        if len(bad):
            lines = np.sort(self._made, order=("key", "line"))
            code, names = _numbered(lines["key"], lines["line"], b["key"][bad])
            again = np.searchsorted(code, names | a["line"][bad]) < np.searchsorted(code, names | b["line"][bad])
            bad = bad[~again]
        self.ledger.judge(
            MOVED, int(judged.sum()), bad, (a["line"], b["line"]),
            lambda i: f"page {int(a['frame'][i]):#x}, then {int(b['frame'][i]):#x}",
        )  # fmt: skip
        newest = every[np.append(every["key"][1:] != every["key"][:-1], np.ones(min(len(every), 1), dtype=np.bool_))]
        self._places = newest[-KNOWN // 16 :]
        self._placed = max(self._placed, int(rows["line"][-1]) if len(rows) else 0)

    def _store(self, changes: NDArray[Any], left: Words) -> None:
        if not len(changes):
            return
        end = np.concatenate([changes["key"][1:] != changes["key"][:-1], [True]])
        end |= np.concatenate([changes["epoch"][1:] != changes["epoch"][:-1], [True]])
        new = np.zeros(int(end.sum()), dtype=_STATE)
        for name in ("epoch", "line", "pid", "old", "gfn"):
            new[name] = changes[name][end]
        new["key"] = changes["key"][end] ^ _coded(changes["epoch"][end])
        new["left"] = left[end]
        both = np.concatenate([self._table, new])
        both = both[both["epoch"] >= both["epoch"].max() - 1]
        both = both[np.lexsort((both["line"], both["key"]))]
        both = both[np.append(both["key"][1:] != both["key"][:-1], True)]
        if len(both) > KNOWN:
            both = np.sort(both[np.argsort(both["line"], kind="stable")[len(both) - KNOWN // 2 :]], order="key")
        self._table = both


def _numbered(keys: Words, lines: Lines, asked: Words) -> tuple[Lines, Lines]:
    """Sorted (key, line) pairs as single numbers, and the numbers of other keys at line 0."""
    _, number = np.unique(np.concatenate([keys, asked]), return_inverse=True)
    number = number.astype(np.int64) << 40
    return np.sort(number[: len(keys)] | lines), number[len(keys) :]


def _coded(epoch: Lines) -> Words:
    return (epoch & 7).astype(np.uint64) << EPOCH


def _parent(rows: NDArray[Any]) -> Words:
    """The names of the entries one level up."""
    level = rows["level"].astype(np.int64) + 1
    span = (np.uint64(1) << (np.uint64(9) * np.clip(level - 1, 0, 5).astype(np.uint64))) - np.uint64(1)
    as_id = rows["key"] >> np.uint64(52) & np.uint64(15)
    return histories.key_of_gfn(as_id, level, rows["gfn"] & ~span)


def _name(row: Any) -> str:
    level = f" level {int(row['level'])}" if row["level"] else ""
    return f"gfn {int(row['gfn']):#x}{level}"
