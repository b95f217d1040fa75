"""``saw baseline``: what an external scanner says of a host's hardening, and whether that is good enough."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

import msgspec

from saw.baseline.judge import compare, judge, read_floor
from saw.baseline.report import Finding, read_report
from saw.cli.operator_options import fields, show


def main(argv: list[str]) -> int:
    """Run ``saw baseline score`` or ``compare``; 1 when the report does not hold."""
    options = _parser().parse_args(argv)
    answer, text = _score(options) if options.command == "score" else _compare(options)
    show({"ok": not answer["problems"], **answer}, text, as_json=options.json)
    return 1 if answer["problems"] else 0


def _score(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    report = read_report(options.report)
    floor = read_floor(options.floor) if options.floor else None
    verdict = judge(report, floor, datetime.now(UTC).date())
    about = {
        "scanner": f"{report.scanner} {report.version}",
        "system": report.system,
        "tests": report.tests,
        "index": report.index,
        "floor": verdict.floor,
        "warnings": len(report.warnings),
        "suggestions": len(report.suggestions),
        "waived": len(verdict.waived),
    }
    found = msgspec.to_builtins(verdict)
    lines = [fields(about), *_listed("problem", verdict.problems), *_findings("open", verdict.open)]
    lines += _listed("waiver that nothing needs", verdict.unused)
    return {**about, **{name: found[name] for name in ("problems", "open", "waived", "unused")}}, "\n".join(lines)


def _compare(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    result = compare(read_report(options.before), read_report(options.after))
    about = {"before": result.before, "after": result.after, "gone": len(result.gone), "new": len(result.new)}
    lines = [fields(about), *_listed("problem", result.problems), *_findings("new", result.new)]
    lines += _findings("gone", result.gone)
    return msgspec.to_builtins(result), "\n".join(lines)


def _listed(word: str, texts: tuple[str, ...]) -> list[str]:
    return [f"{word}: {text}" for text in texts]


def _findings(word: str, findings: tuple[Finding, ...]) -> list[str]:
    return [f"{word}: {one.test} {one.text}{f' ({one.details})' if one.details else ''}" for one in findings]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saw baseline", description="Hardening as an external scanner (Lynis) sees it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="read a report and hold it against a floor")
    score.add_argument("report", help="lynis-report.dat of a finished scan")
    score.add_argument("--floor", metavar="FILE", help="least score and waivers (docs/baseline.md)")
    score.add_argument("--json", action="store_true", help="print JSON")
    two = commands.add_parser("compare", help="compare two scans of one host; 1 when the second is worse")
    two.add_argument("before", help="report of the first scan")
    two.add_argument("after", help="report of the second scan")
    two.add_argument("--json", action="store_true", help="print JSON")
    return parser
