"""Plain-Python twins of the vectorised walk: one access at a time, ints only, early exits. Slow and easy to believe."""

P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
OK = None


def reserved_bits(name, level, leaf, maxphyaddr, nxe):
    """The positions that must be 0 in a present entry, by paging mode, listed one by one as the manuals do."""
    if name in ("legacy", "legacy-pse"):
        return set(range(17, 22)) if leaf and level == 2 else set()
    if name == "pae" and level == 3:
        return {1, 2, 5, 6, 7, 8, 63} | set(range(maxphyaddr, 63))
    bits = set(range(maxphyaddr, 63 if name == "pae" else 52)) | (set() if nxe else {63})
    if leaf and level == 2:
        bits |= set(range(13, 21))
    if leaf and level == 3:
        bits |= set(range(13, 30))
    if level > 3:
        bits |= {7}
    return bits


def access(
    entries, *, name="long4", maxphyaddr=52, write=False, fetch=False, user=False, wp=True, nxe=True,
    smep=False, smap=False, ac=False, pke=False, pkru=0, implicit=False, levels=None,
):  # fmt: skip
    """One access through a list of entries, root first: (error code or None for no fault, entries afterwards).

    ``levels`` is the level of the first entry, where the list ends before level 1.
    """
    user = user and not implicit
    large = {"long4": {2, 3}, "long5": {2, 3}, "pae": {2}, "legacy": set(), "legacy-pse": {2}}[name]
    code = W * write | U * user | 0x10 * (fetch and (nxe or smep))
    writable = user_page = executable = True
    used = []
    for place, entry in enumerate(entries):
        level = (levels or len(entries)) - place
        leaf = level == 1 or (level in large and bool(entry & PS))
        if not entry & P:
            return code, entries
        if any(entry >> bit & 1 for bit in reserved_bits(name, level, leaf, maxphyaddr, nxe)):
            return code | P | 8, entries
        used.append(place)
        if not (name == "pae" and level == 3):
            writable, user_page = writable and bool(entry & W), user_page and bool(entry & U)
            executable = executable and not (entry & NX and not name.startswith("legacy"))
        if leaf:
            break
    code |= P
    allowed = True
    if user:
        allowed = user_page and (writable or not write) and (executable or not fetch)
    else:
        if write and wp and not writable:
            allowed = False
        if fetch and (not executable or (smep and user_page)):
            allowed = False
        if smap and user_page and not fetch and (implicit or not ac):
            allowed = False
    if pke and name.startswith("long") and user_page and not fetch:
        key = pkru >> 2 * (entry >> 59 & 15) & 3
        if key & 1 or (key & 2 and write and (user or wp)):
            allowed, code = False, code | 0x20
    if not allowed:
        return code, entries
    after = list(entries)
    for place in used:
        if not (name == "pae" and (levels or len(entries)) - place == 3):
            after[place] |= A
    after[used[-1]] |= D * write
    return OK, after
