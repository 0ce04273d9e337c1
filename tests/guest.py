"""A guest in plain Python that edits its own page tables: it makes scenarios with the traces KVM would print for them.

One access at a time, memory a dict of 4-byte words, walks by :func:`plain.access`. It records only some walks, as
shadow paging does: an access that faults, and by a throw of dice others; a walk that is not printed sets no A or D.
"""

import json
import random

import numpy as np

from tests import plain

HEAD = [("line", np.int64), ("ns", np.int64), ("pid", np.int64)]
FIELDS = {
    "kvm_mmu_pagetable_walk": [("addr", np.uint64), ("pferr", np.uint64)],
    "kvm_mmu_paging_element": [("pte", np.uint64), ("level", np.int64)],
    "kvm_mmu_walker_error": [("pferr", np.uint64)],
    "kvm_entry": [("vcpu", np.int64)],
    "kvm_exit": [("vcpu", np.int64), ("reason", "S48"), ("rip", np.uint64), ("intr_info", np.uint64)],
    "kvm_page_fault": [("vcpu", np.int64), ("address", np.uint64), ("error_code", np.uint64)],
    "kvm_inj_exception": [("exception", "S8"), ("reinjected", np.int64)],
    "kvm_emulate_insn": [],
}
MODES = {  # name: walk rules, index bits, entry bytes, cr4, efer
    "long64": ("long4", (9, 9, 9, 9), 8, 0x20, 0xD01),
    "pae32": ("pae", (2, 9, 9), 8, 0x20, 0x800),
    "leg32": ("legacy", (10, 10), 4, 0x0, 0x0),
    "pse32": ("legacy-pse", (10, 10), 4, 0x10, 0x0),
}
ROOTS, DATA, PID = (0x4000000, 0x4020000), 0x800000, 77


class Guest:
    def __init__(self, mode, seed, nested=False):
        self.rules, self.bits, self.size, self.cr4, self.efer = MODES[mode]
        self.mode, self.dice, self.nested, self.memory, self.line = mode, random.Random(seed), nested, {}, 0
        self.nxe, self.rule = bool(self.efer & 0x800), {"name": self.rules, "maxphyaddr": 40, "levels": len(self.bits)}
        self.cr3, self.wp, self.free, self.events, self.rows = ROOTS[0], True, {}, [], {name: [] for name in FIELDS}
        for root in ROOTS:
            self.free[root] = root + 0x1000
            if self.rules == "pae":
                for directory in range(4):
                    self.table(root, directory << 30, 2)
            self.gmap(root, 0x1000, 0x1000, 15, 0x63)
            self.gmap(root, DATA, 0x1000000, 16, 0x7)
            self.gmap(root, root, root, 16, 0x63)
        vcpu = {
            "t": "vcpu",
            "vcpu": 0,
            "gmode": mode,
            "cr3": hex(self.cr3),
            "cr4": hex(self.cr4),
            "efer": hex(self.efer),
        }
        self.events.append(vcpu | {"cr0": "0x80010033"})

    def put(self, gpa, value, size):
        for half in range(size // 4):
            self.memory[gpa + 4 * half] = value >> 32 * half & 0xFFFFFFFF

    def get(self, gpa, size):
        return sum(self.memory.get(gpa + 4 * half, 0) << 32 * half for half in range(size // 4))

    def slot(self, table, gva, level):
        shift = 12 + sum(self.bits[len(self.bits) - level + 1 :])
        return table + (gva >> shift & (1 << self.bits[len(self.bits) - level]) - 1) * self.size

    def table(self, root, gva, level):
        """The table of ``level`` for ``gva``, and every one above it, made where they are missing."""
        if level == len(self.bits):
            return root
        slot = self.slot(self.table(root, gva, level + 1), gva, level + 1)
        if not self.get(slot, self.size) & 1:
            pointer = self.rules == "pae" and level == 2
            self.put(slot, self.free[root] | (1 if pointer else 0x27), self.size)
            self.free[root] += 0x1000
        return self.get(slot, self.size) & ~0xFFF

    def gmap(self, root, gva, gpa, pages, flags):
        for page in range(0, pages * 0x1000, 0x1000):
            self.put(self.slot(self.table(root, gva + page, 1), gva + page, 1), gpa + page | flags, self.size)
        gmap = {"t": "gmap_range", "n": pages, "root": hex(root), "gva": hex(gva), "gpa": hex(gpa), "flags": hex(flags)}
        self.events.append(gmap)

    def path(self, gva):
        """Where the entries for ``gva`` lie, root first, as far as there are tables."""
        table, slots = self.cr3, []
        for level in range(len(self.bits), 0, -1):
            slots.append(self.slot(table, gva, level))
            entry = self.get(slots[-1], self.size)
            if not entry & 1 or (entry & 0x80 and level == 2 and self.rules != "legacy"):
                break
            table = entry & 0xFFFFFFFFFF000
        return slots

    def emit(self, event, *values):
        self.line += self.dice.randint(1, 3)
        self.rows[event].append((self.line, self.line * 1000, PID, *values))

    def walk(self, gva, slots, code, after, *, write=False, user=False, fetch=False):
        """Print a walk; if it goes through, it sets A and D."""
        self.emit("kvm_mmu_pagetable_walk", gva, write * 2 | user * 4 | fetch * 16)
        for place, slot in enumerate(slots):
            self.emit("kvm_mmu_paging_element", self.get(slot, self.size), len(self.bits) - place)
        if code is None:
            self.mark(slots, after)
        else:
            self.emit("kvm_mmu_walker_error", code)

    def mark(self, slots, after):
        for slot, entry in zip(slots, after, strict=True):
            self.put(slot, entry, self.size)

    def fetch(self):
        """The emulator fetches the instruction at the guest's rip."""
        slots = self.path(0x10EE)
        code, after = plain.access([self.get(slot, self.size) for slot in slots], **self.rule, fetch=True, nxe=self.nxe)
        assert code is None, "the guest's code stays mapped"
        self.walk(0x10EE, slots, code, after, fetch=True)

    def access(self, op, gva, value):
        """Make one access and print what KVM would; say whether it exited, and whether the trace shows its end."""
        kind, user = op.removeprefix("u"), op.startswith("u")
        options = {"write": kind in ("W", "RMW"), "fetch": kind == "X", "user": user, "wp": self.wp, "nxe": self.nxe}
        slots = self.path(gva)
        entries = [self.get(slot, self.size) for slot in slots]
        code, after = plain.access(entries, **self.rule, **options)
        printed, emulated = code is not None or self.dice.random() < 0.5, self.dice.random() < 0.2
        if printed:
            self.emit("kvm_exit", 0, b"PF excp", 0, 0)
            self.walk(gva, slots, code, after, write=options["write"], user=user, fetch=options["fetch"])
            if code is not None:
                self.emit("kvm_inj_exception", b"#PF", 0)
            elif emulated:  # KVM fetches the instruction, and walks once more for the emulator's own access
                self.fetch()
                self.emit("kvm_emulate_insn")
                code, after = plain.access([self.get(slot, self.size) for slot in slots], **self.rule, **options)
                self.walk(gva, slots, code, after, write=options["write"], user=user, fetch=options["fetch"])
            self.emit("kvm_entry", 0)
        elif code is None and self.nested:
            self.mark(slots, after)
        if code is None and options["write"]:
            low = (1 << 12 + sum(self.bits[len(slots) :])) - 1
            gpa = (entries[-1] & 0xFFFFFFFFFF000 & ~low) | (gva & low)
            width = 8 if self.mode == "long64" else 4
            self.put(gpa, self.get(gpa, width) + 1 if kind == "RMW" else value, width)
        return printed, printed and (code is not None or emulated)

    def control(self, op, value):
        reason = {"INVLPG": b"invlpg", "CR3": b"write_cr3", "CR0": self.dice.choice([b"write_cr0", b"cr0_sel_write"])}
        self.emit("kvm_exit", 0, reason[op], 0, 0)
        self.fetch()
        self.emit("kvm_emulate_insn")
        if op == "CR3":
            self.cr3 = value
        if op == "CR0":
            self.wp = bool(value >> 16 & 1)
        self.emit("kvm_entry", 0)

    def choose(self):
        """An operation: mostly data, often an edit of the table that maps it, sometimes of one further up."""
        dice, page = self.dice, DATA + self.dice.randrange(12) * 0x1000
        if (throw := dice.random()) < 0.5:
            return (
                dice.choice(["R", "W", "uR", "uW", "X", "RMW"]),
                page + dice.randrange(512) * 8,
                dice.randrange(1 << 32),
            )
        if throw < 0.85:
            slots = self.path(page)
            slot = slots[-1] if dice.random() < 0.8 else dice.choice(slots[1:] or slots)
            entry = self.get(slot, self.size) ^ dice.choice([0x20, 0x40, 0x60, 2, 4, 1, 0x80, 1 << 63, 1 << 51, 0x1000])
            if slot != slots[-1]:  # an upper entry: clear A, W or U; a leaf: point it elsewhere, too
                entry = self.get(slot, self.size) ^ dice.choice([0x20, 2, 4])
            if not entry & 1:
                entry |= dice.choice([0, 1])
            return ("W", slot, entry & (1 << 8 * self.size) - 1)
        if throw < 0.92:
            return "INVLPG", page, 0
        return ("CR3", dice.choice(ROOTS), 0) if throw < 0.97 else ("CR0", dice.choice([0x80010033, 0x80000033]), 0)

    def run(self, count):
        """Run ``count`` operations. One that went through does not fault again before another exit lies between."""
        begin, made, fixed = self.line * 1000 + 500, [], set()
        self.line += 5
        while len(made) < count:
            op, gva, value = self.choose()
            if (op.removeprefix("u"), gva) in fixed:
                op, gva, value = "INVLPG", gva, 0
            made.append([op, hex(gva), hex(value), "0x0", None])
            if op in ("INVLPG", "CR3", "CR0"):
                self.control(op, gva)
                fixed.clear()
                continue
            exited, over = self.access(op, gva, value)
            fixed = (set() if exited else fixed) | (set() if over else {(kind, gva) for kind in ("R", "W", "RMW", "X")})
        self.line += 5
        end = self.line * 1000
        self.events.append({"t": "run", "vcpu": 0, "phase": "", "ns": begin, "ns_end": end, "accesses": made})

    def scenario(self):
        params = {"kvm_amd.npt": "Y" if self.nested else "N"}
        return json.dumps({"scenario": "made", "guest_mode": self.mode, "params": params, "events": self.events})

    def trace(self):
        return {name: np.array(self.rows[name], dtype=HEAD + fields) for name, fields in FIELDS.items()}
