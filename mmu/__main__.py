"""``python -m mmu``: decode a word, check a record, explore a protocol, report on a trace.

Text for people goes to stdout and diagnostics to stderr; with ``--json`` stdout holds exactly one JSON object.
Exit codes: 0 done and all agree; 1 compared and not all agree; 2 input or arguments unusable, or nothing to compare;
3 stopped early.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, NoReturn

DONE, DISAGREE, UNUSABLE, STOPPED = 0, 1, 2, 3


def _emit(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=None, allow_nan=False))


def _stopped(arguments: list[str]) -> int:
    """Say that Ctrl-C came before there was anything to tell."""
    print("stopped before it was done", file=sys.stderr)
    if "--json" in arguments:
        _emit({"complete": False, "stopped": "interrupted"})
    return STOPPED


try:  # reading the package takes a moment, in which Ctrl-C may come
    from mmu import check as checking
    from mmu import explore_cli, pfec, report, spte
    from mmu.bits import hexadecimal
except KeyboardInterrupt:
    sys.exit(_stopped(sys.argv))


def _decode_code(code: int) -> dict[str, Any]:
    verdicts = {rule: pfec.verdict(code, rule) for rule in pfec.SOURCES}
    return {
        "fields": pfec.PFEC.unpack(code),
        "state": "impossible" if pfec.impossible(code) else pfec.PFEC.text(code),
        "verdict": {rule: verdict.verdict for rule, verdict in verdicts.items()},
        "reason": {rule: f"{verdict.reason} ({pfec.SOURCES[rule]})" for rule, verdict in verdicts.items()},
        "text": pfec.describe(code),
    }


def _decode_ept(qualification: int) -> dict[str, Any]:
    code = pfec.from_ept(qualification)
    decoded = _decode_code(code)
    text = f"{pfec.EPT_QUALIFICATION.text(qualification)}; Linux 6.1 makes of it {pfec.PFEC.text(code)} ({code:#x})"
    fields = pfec.EPT_QUALIFICATION.unpack(qualification)
    return {**decoded, "fields": fields, "pfec": f"{code:#x}", "text": f"{text}: {decoded['text']}"}


DECODERS = {
    "pfec": lambda word, layout: _decode_code(word),
    "ept": lambda word, layout: _decode_ept(word),
    "npf": lambda word, layout: _decode_code(pfec.from_npt(word)),
    "spte": spte.decode_report,
}


def decode(options: argparse.Namespace) -> int:
    """Decode one word."""
    record = {"kind": options.kind, "value": options.value, "layout": options.layout}
    try:
        flags = options.kind == "pfec" and options.value.strip()  # no flag at all is no code
        value = pfec.PFEC.parse(options.value) if flags else hexadecimal(options.value)
        decoded = DECODERS[options.kind](value, options.layout)
    except ValueError as error:
        print(f"decode: {error}", file=sys.stderr)
        if options.json:
            _emit({**record, **dict.fromkeys(("fields", "state", "verdict", "reason", "text")), "error": str(error)})
        return UNUSABLE
    record |= {"value": f"{value:#x}", **decoded}
    if options.json:
        _emit(record)
        return DONE
    print(f"{options.kind} {value:#x}")
    print(f"  layout   {options.layout}")
    print(f"  state    {record['state']}")
    print(f"  text     {record['text']}")
    if isinstance(record["verdict"], str):  # an spte has one verdict, an error code one a rule
        print(f"  verdict  {record['verdict']}: {record['reason']}")
        return DONE
    for rule, verdict in record["verdict"].items():
        print(f"  verdict  {verdict} by {rule}: {record['reason'][rule]}")
    return DONE


def check(options: argparse.Namespace) -> int:
    """Compare records with the package's own answers."""
    files, errors, worst = [], [], DONE
    for path in options.files:
        try:
            checked = checking.check(path, scenario=options.scenario, layout=options.layout)
        except checking.Unusable as error:
            print(f"check: {error}", file=sys.stderr)
            errors.append({"path": path, "reason": str(error)})
            worst = UNUSABLE
            continue
        except KeyboardInterrupt:
            print(f"check: {path}: PARTIAL: stopped before it was done", file=sys.stderr)
            worst = STOPPED
            break
        files.append(checked)
        if not checked.of and checked.complete:
            print(f"check: {path}: nothing in it to compare", file=sys.stderr)
        fine = checked.agree == checked.of and not checked.findings
        worst = max(worst, UNUSABLE if not checked.of else DONE if fine else DISAGREE)
        if not options.json:
            _print_checked(checked)
        if not checked.complete:
            worst = STOPPED
            break
    agree, of = sum(f.agree for f in files), sum(f.of for f in files)
    if options.json:
        told = {"files": [f.as_json() for f in files], "errors": errors}
        _emit({**told, "agree": agree, "of": of, "complete": worst != STOPPED})
    else:
        print(f"agree {agree} of {of}")
    return worst


def _print_checked(checked: checking.Checked) -> None:
    beside = f", scenario {checked.scenario}" if checked.scenario else ""
    print(f"{checked.path}: {checked.kind}, held against {checked.rules}{beside}")
    for kind, count in checked.counts.items():
        print(f"  {kind:<12} agree {count['agree']} of {count['of']}")
    for wrong in checked.disagreements[:20]:
        print(
            f"  line {wrong['line']}: predicted {wrong['predicted']}, recorded {wrong['recorded']}: {wrong['reason']}"
        )
    if len(checked.disagreements) > 20:
        print(f"  and {len(checked.disagreements) - 20} more (all with --json)")
    for found in checked.findings[:20]:
        lines = ", ".join(str(line) for line in found["lines"][-4:])
        what = f" {found['what']}" if "what" in found else ""
        print(f"  finding, line{'s' if len(found['lines']) > 1 else ''} {lines}:{what}")
        print(f"    against the rule: {found['rule']} ({found['source']})")
    if len(checked.findings) > 20:
        print(f"  and {len(checked.findings) - 20} more findings (all with --json)")
    absent = [rule for rule in checked.not_applied if rule["reason"].startswith("the trace has no")]
    for reason in dict.fromkeys(rule["reason"] for rule in checked.not_applied if rule not in absent):
        rules = [rule["rule"] for rule in checked.not_applied if rule["reason"] == reason]
        print(f"  not applied: {'; '.join(rules[:3])}{f' and {len(rules) - 3} more' if rules[3:] else ''}: {reason}")
    if absent:
        print(f"  not applied: {len(absent)} rules about events that the trace has not (all with --json)")
    if not checked.complete:
        print("  PARTIAL: stopped before the end")
    for line in checked.unreadable[:20]:
        print(f"  line {line['line']} unreadable: {line['reason']}")


_LAYOUT_HELP = f"one of {', '.join(spte.LAYOUTS)}; default {spte.DEFAULT}"


class _Usage(Exception):
    """The arguments are none that the command takes."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise _Usage(f"{self.prog}: {message}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _Parser(prog="python -m mmu", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("decode", help="say what the bits of one word mean")
    one.add_argument("kind", choices=sorted(DECODERS))
    one.add_argument("value", help="hexadecimal, 0x optional; pfec also takes P|W|U")
    one.add_argument("--layout", choices=list(spte.LAYOUTS), default=spte.DEFAULT, metavar="NAME", help=_LAYOUT_HELP)
    one.set_defaults(run=decode)

    two = commands.add_parser("check", help="compare recorded answers with the package's own")
    two.add_argument("files", nargs="+", metavar="FILE", help="plain or gzipped; - is standard input")
    which = two.add_mutually_exclusive_group()
    which.add_argument("--scenario", metavar="FILE", help="of a trace; default: the JSON beside it")
    which.add_argument("--no-scenario", dest="scenario", action="store_const", const=checking.NO_SCENARIO)
    two.add_argument("--layout", choices=list(spte.LAYOUTS), metavar="NAME", help=_LAYOUT_HELP)
    two.set_defaults(run=check)

    explore_cli.add_parser(commands)
    report.add_parser(commands)
    for command in (one, two):
        command.add_argument("--json", action="store_true", help="print exactly one JSON object")
    if hasattr(sys.stdout, "reconfigure"):  # not every terminal knows every character, and paths may hold any byte
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = parser.parse_args(arguments)
        code = options.run(options)
        print(end="", flush=True)
        return code
    except _Usage as error:
        print(error, file=sys.stderr)
        if "--json" in arguments:
            _emit({"error": str(error)})
        return UNUSABLE
    except KeyboardInterrupt:
        return _stopped(arguments)
    except BrokenPipeError:  # whoever read the output has seen enough
        _discard_output()
        return DONE
    except OSError as error:  # input that cannot be read was dealt with: this is the output, on a full disk
        _discard_output()
        print(f"{parser.prog}: {error.strerror or error}", file=sys.stderr)
        return UNUSABLE


def _discard_output() -> None:
    """What is still buffered has nowhere to go: at its end Python shall not try once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
