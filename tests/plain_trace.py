"""A reader of kernel traces as one would write it in an afternoon: one regular expression an event, one line at a time.

It reads what an unbroken ftrace file holds, and is what :mod:`mmu.trace` is compared with, in values and in speed.
"""

import re

HEAD = re.compile(
    r"\s*(?P<comm>.+?)-(?P<pid>\d+)\s+\[(?P<cpu>\d+)\]\s+(?P<flags>\S+)\s+"
    r"(?P<s>\d+)\.(?P<us>\d{6}): (?P<event>\w+): (?P<text>.*)"
)
DECIMAL = "vcpu level as_id spurious fixed ret slot used ring len code root quadrant gpte_bytes errno valid".split()
TEXT = "reason caller function text exception insn".split()
CHOICES = {
    "access": "--- --x w-- w-x -u- -ux wu- wux".split(),
    "unsync": ["sync", "unsync"],
    "created": ["existing", "new"],
    "nxe": ["!nxe", "nxe"],
    "ad": ["!ad", "ad"],
    "direct": ["", " direct"],
    "invalid": ["", " invalid"],
    "r": ["-", "r"],
    "w": ["-", "w"],
    "x": ["-", "x"],
    "u": ["-", "u"],
    "kind": ["read", "write", "unsatisfied-read"],
    "write": ["Read", "Write"],
    "gpa_match": ["GVA", "GPA"],
    "reinjected": ["", " [reinjected]"],
    "immediate_exit": ["", "[immediate exit]"],
}
FLAGS = {"P": 1, "W": 2, "U": 4, "RSVD": 8, "F": 16}

_PAGE = (
    r"sp gen (?P<gen>\w+) gfn (?P<gfn>\w+) l(?P<level>\d) (?P<gpte_bytes>\d)-byte"
    r" q(?P<quadrant>\d)(?P<direct>(?: direct)?) (?P<access>\S{3})(?P<invalid>(?: invalid)?)"
    r" (?P<nxe>!?nxe) (?P<ad>!?ad) root (?P<root>\d+) (?P<unsync>\w+)"
)
_EVENTS = {
    "kvm_entry": r"vcpu (?P<vcpu>\d+), rip 0x(?P<rip>\w+?)(?P<immediate_exit>(?:\[immediate exit\])?)",
    "kvm_exit": r"vcpu (?P<vcpu>\d+) reason (?P<reason>.+?) rip 0x(?P<rip>\w+) info1 0x(?P<info1>\w+)"
    r" info2 0x(?P<info2>\w+) intr_info 0x(?P<intr_info>\w+) error_code 0x(?P<error_code>\w+)",
    "kvm_page_fault": r"vcpu (?P<vcpu>\d+) rip 0x(?P<rip>\w+) address 0x(?P<address>\w+)"
    r" error_code 0x(?P<error_code>\w+)",
    "kvm_mmio": r"mmio (?P<kind>\S+) len (?P<len>\d+) gpa 0x(?P<gpa>\w+) val 0x(?P<val>\w+)",
    "vcpu_match_mmio": r"gva 0x(?P<gva>\w+) gpa 0x(?P<gpa>\w+) (?P<write>\w+) (?P<gpa_match>\w+)",
    "kvm_inj_exception": r"(?P<exception>#\w+)(?: \(0x(?P<error_code>\w+)\))?(?P<reinjected>(?: \[reinjected\])?)",
    "kvm_emulate_insn": r"(?P<csbase>\w+):(?P<rip>\w+):(?P<insn>.*)",
    "kvm_userspace_exit": r"reason (?P<reason>\w+) \((?P<code>\d+)\)",
    "kvm_unmap_hva_range": r"mmu notifier unmap range: 0x(?P<start>\w+) -- 0x(?P<end>\w+)",
    "kvm_set_spte_hva": r"mmu notifier set pte hva: 0x(?P<hva>\w+)",
    "kvm_dirty_ring_push": r"ring (?P<ring>\d+): dirty 0x(?P<dirty>\w+) reset 0x(?P<reset>\w+) slot (?P<slot>\d+)"
    r" offset 0x(?P<offset>\w+) \(used (?P<used>\d+)\)",
    "kvm_dirty_ring_reset": r"ring (?P<ring>\d+): dirty 0x(?P<dirty>\w+) reset 0x(?P<reset>\w+) \(used (?P<used>\d+)\)",
    "kvm_dirty_ring_exit": r"vcpu (?P<vcpu>\d+)",
    "kvm_mmu_pagetable_walk": r"addr (?P<addr>\w+) pferr (?P<pferr>\w+) [PWUFRSVD|]*",
    "kvm_mmu_paging_element": r"pte (?P<pte>\w+) level (?P<level>\d)",
    "kvm_mmu_set_accessed_bit": r"gpa (?P<gpa>\w+)",
    "kvm_mmu_set_dirty_bit": r"gpa (?P<gpa>\w+)",
    "kvm_mmu_walker_error": r"pferr (?P<pferr>\w+) [PWUFRSVD|]*",
    "kvm_mmu_get_page": _PAGE + " (?P<created>new|existing)",
    "kvm_mmu_sync_page": _PAGE,
    "kvm_mmu_unsync_page": _PAGE,
    "kvm_mmu_prepare_zap_page": _PAGE,
    "mark_mmio_spte": r"sptep:(?P<sptep>\w+) gfn (?P<gfn>\w+) access (?P<access_bits>\w+) gen (?P<gen>\w+)",
    "handle_mmio_page_fault": r"addr:(?P<addr>\w+) gfn (?P<gfn>\w+) access (?P<access_bits>\w+)",
    "check_mmio_spte": r"spte (?P<spte>\w+) kvm_gen (?P<kvm_gen>\w+) spte-gen (?P<spte_gen>\w+) valid (?P<valid>\d)",
    "fast_page_fault": r"vcpu (?P<vcpu>\d+) gva (?P<gva>\w+) error_code (?P<flags>\S*) sptep (?P<sptep>\w+)"
    r" old (?:0x)?(?P<old>\w+) new (?P<new>\w+) spurious (?P<spurious>\d) fixed (?P<fixed>\d)",
    "kvm_mmu_zap_all_fast": r"kvm-mmu-valid-gen (?P<gen>\w+) used_pages (?P<used_pages>\w+)",
    "kvm_mmu_set_spte": r"gfn (?P<gfn>\w+) spte (?P<spte>\w+) \((?P<r>.)(?P<w>.)(?P<x>.)(?P<u>.)\) level (?P<level>\d)"
    r" at (?P<sptep>\w+)",
    "kvm_mmu_spte_requested": r"gfn (?P<gfn>\w+) pfn (?P<pfn>\w+) level (?P<level>\d)",
    "kvm_tdp_mmu_spte_changed": r"as id (?P<as_id>\d) gfn (?P<gfn>\w+) level (?P<level>\d) old_spte (?P<old_spte>\w+)"
    r" new_spte (?P<new_spte>\w+)",
    "kvm_mmu_split_huge_page": r"gfn (?P<gfn>\w+) spte (?P<spte>\w+) level (?P<level>\d) errno (?P<errno>\d)",
    "tracing_mark_write": r"(?P<text>.*)",
}
EVENTS = {event: re.compile(pattern) for event, pattern in _EVENTS.items()}
RETURN = re.compile(r"\((?P<caller>.*) <- (?P<function>\w+)\) ret=(?P<ret>\d+)")


def value(name, text):
    """One field's text as the number or string that it is."""
    if name == "flags":
        return sum(FLAGS[flag] if flag in FLAGS else int(flag, 16) for flag in text.split("|") if flag)
    if name in CHOICES:
        return CHOICES[name].index(text)
    if name in TEXT:
        return text.rstrip().encode()
    return int(text, 10 if name in DECIMAL else 16)


def read(text):
    """Every event of a trace: a list of (line, event, fields), where fields is a dict."""
    events = []
    for number, line in enumerate(text.split("\n"), start=1):
        head = HEAD.fullmatch(line)
        if not head:
            continue
        match = EVENTS.get(head["event"], RETURN).fullmatch(head["text"])
        if not match:
            raise ValueError(f"line {number}: {line!r}")
        fields = {
            "ns": int(head["s"]) * 10**9 + int(head["us"]) * 1000,
            "cpu": int(head["cpu"]),
            "pid": int(head["pid"]),
        }
        fields["comm"] = head["comm"].encode()
        for name, part in match.groupdict().items():
            if part is not None:
                fields[{"flags": "error_code", "access_bits": "access"}.get(name, name)] = value(name, part)
        events.append((number, head["event"], fields))
    return events
