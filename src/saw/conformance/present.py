"""Reports for people: the table on the terminal, one HTML page per report, and the comparison of several.

The pages have no script, no link and no external resource. Every text is escaped: much of it was written by what ran inside a
sandbox.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from html import escape

from saw.conformance.case import SUITES
from saw.conformance.report import Counts, Report
from saw.conformance.verdict import CaseResult

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--line:#d0d7de;--soft:#57606a;--bad:#b3001b;--good:#1a7f37;
--warn:#b45309}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117;--line:#30363d;--soft:#9aa4af;--bad:#ff7b72;
--good:#56d364;--warn:#f0a35e}}
body{margin:2rem auto;max-width:80rem;padding:0 1rem;font:15px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper)}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}th,td{border-bottom:1px solid var(--line);padding:.3rem .6rem;text-align:left;
vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
code{font:13px/1.4 ui-monospace,monospace;overflow-wrap:anywhere}
.refused{color:var(--good)}.allowed,.error,.wrong_reason,.broken{color:var(--bad);font-weight:600}.unknown{color:var(--warn)}
.not_applicable,.soft{color:var(--soft)}details{margin:.1rem 0}summary{cursor:pointer}
@media print{body{margin:0;max-width:none;font-size:11px}details>*{display:block}}
"""
_CONTROL = re.compile(r"[^ -~\xa1-\u024f…·→’]")
COLUMNS = ("right", "unknown", "wrong_reason", "allowed", "error", "twin_broken", "not_applicable")
HEADINGS = ("right", "unknown", "wrong", "allowed", "error", "no twin", "n/a")


def plain(text: object) -> str:
    """Return ``text`` in one line, without characters that steer a terminal or hide in a page."""
    return _CONTROL.sub(lambda found: f"\\u{{{ord(found[0]):x}}}", str(text))


def _html(text: object) -> str:
    return escape(plain(text), quote=True)


def _lines(rows: Sequence[Sequence[object]]) -> str:
    table = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(table[0]))]

    def line(row: list[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])

    return "\n".join(line(row) for row in table)


def _row(name: str, counts: Counts) -> list[object]:
    score = f"{counts.score:.1f} %" if counts.applicable else "-"
    return [name, *(getattr(counts, column) for column in COLUMNS), score]


def suite_line(name: str, cases: list[CaseResult]) -> str:
    """Return what is said when a suite is done."""
    findings = sum(case.finding for case in cases)
    applicable = sum(case.result != "not_applicable" for case in cases)
    return f"{name}: {applicable} of {len(cases)} cases tried, {findings} to look at"


def findings(report: Report) -> list[str]:
    """Return one line for each case that somebody must look at."""
    found = []
    for case in report.cases:
        if case.finding:
            why = case.evidence.get("problem") or case.evidence.get("refused_by") or case.evidence.get("detail") or ""
            state = case.result if case.result != "refused" else f"twin broken ({case.twin.id}: {case.twin.detail})"
            found.append(plain(f"! {case.id} [{case.control}] {case.title}: {state} {why}")[:300])
    return found


def elsewhere(report: Report) -> list[str]:
    """Return one line for each case that another layer refused than the one that should."""
    return [
        plain(f"~ {case.id} [{case.control}] {case.title}: refused by {case.layer}, expected of {case.expected_layer}")[
            :300
        ]
        for case in report.cases
        if case.result == "refused" and case.layer_ok is False
    ]


def summary(report: Report) -> str:
    """Return the table of a report, its findings, and what another layer refused than expected."""
    rows: list[list[object]] = [["suite", *HEADINGS, "score"]]
    rows += [_row(name, counts) for name, counts in report.summary.suites.items()]
    rows.append(_row("all", report.summary.total))
    lines = [
        _lines(rows),
        *findings(report),
        *elsewhere(report),
        *(f"! {plain(problem)}" for problem in report.problems),
    ]
    verdict = "everything that could be tried was refused, and every twin works" if report.ok else "there are findings"
    return "\n".join([*lines, f"{plain(report.target)}: {verdict} (score {report.summary.score:.1f} %)"])


def _page(title: str, body: str) -> str:
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    mark = ' class="number"' if numbers else ""
    head = "".join(f"<th{mark if index else ''}>{_html(name)}</th>" for index, name in enumerate(headings))
    lines = ("".join(f"<td{mark if index else ''}>{cell}</td>" for index, cell in enumerate(row)) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def _counts_table(first: str, counts: dict[str, Counts], total: Counts) -> str:
    rows = [[_html(cell) for cell in _row(name, found)] for name, found in [*counts.items(), ("all", total)]]
    return _table((first, *HEADINGS, "score"), rows, numbers=True)


def _case_row(case: CaseResult) -> list[str]:
    result = case.result.replace("_", " ")
    if case.result == "refused" and case.reason_ok is None:
        result += " (reason unknown)"
    if case.result == "refused" and case.layer_ok is False:
        result += " (another layer)"
    facts = "".join(f"<br><b>{_html(name)}</b> <code>{_html(value)}</code>" for name, value in case.evidence.items())
    arrived = {None: "not recorded", True: "arrived", False: "nothing arrived"}[case.arrived]
    twin = f'<span class="{case.twin.result}">{_html(case.twin.id or "-")} {_html(case.twin.result.replace("_", " "))}</span>'
    layer, expected = _html(case.expected_layer), _html(", ".join(case.expected))
    if case.layer:
        layer = f"refused by {_html(case.layer)}, expected of {layer}"
    return [
        f"<code>{_html(case.id)}</code>",
        _html(case.control),
        f'<details><summary>{_html(case.title)}</summary><span class="soft">{layer}; expected {expected}</span>{facts}</details>',
        f'<span class="{case.result}">{_html(result)}</span>',
        _html(arrived),
        twin,
    ]


def page(report: Report) -> str:
    """Return a report as one self-contained HTML page."""
    verdict = (
        "Everything that could be tried was refused, and every twin works." if report.ok else "There are findings."
    )
    about = f"Score {report.summary.score:.1f} %. Started {_html(report.started)}, kit {_html(report.kit_version)}."
    parts = [f"<h1>Conformance of {_html(report.target)}</h1>", f"<p>{verdict} {about}</p>"]
    notes = [*(f"problem: {text}" for text in report.problems), *report.notes]
    if notes:
        parts.append("<ul>" + "".join(f"<li><code>{_html(text)}</code></li>" for text in notes) + "</ul>")
    parts.append(_counts_table("suite", report.summary.suites, report.summary.total))
    headings = ("case", "control", "attack and evidence", "result", "outside", "allowed twin")
    bad = [case for case in report.cases if case.finding]
    if bad:
        parts += ["<h2>To look at</h2>", _table(headings, map(_case_row, bad))]
    for suite in SUITES:
        cases = [case for case in report.cases if case.suite == suite and not case.finding]
        if cases:
            parts += [f"<h2>{_html(suite)}</h2>", _table(headings, map(_case_row, cases))]
    parts += ["<h2>By control</h2>", _counts_table("control", report.summary.controls, report.summary.total)]
    return _page(f"Conformance of {_html(report.target)}", "\n".join(parts))


def _cell(counts: Counts | None) -> str:
    if counts is None or not counts.applicable:
        return "-"
    return f"{counts.right + counts.unknown}/{counts.applicable} ({counts.score:.0f} %)"


def _comparison(reports: Sequence[Report]) -> list[list[str]]:
    rows = [["suite", *(report.target for report in reports)]]
    for suite in SUITES:
        cells = [_cell(report.summary.suites.get(suite)) for report in reports]
        if any(cell != "-" for cell in cells):
            rows.append([suite, *cells])
    rows.append(["all", *(_cell(report.summary.total) for report in reports)])
    return rows


def comparison(reports: Sequence[Report]) -> str:
    """Return the comparison as text: refused of applicable cases, by suite."""
    return _lines(_comparison(reports))


def _word(case: CaseResult | None) -> str:
    if case is None:
        return "-"
    return "twin broken" if case.result == "refused" and case.twin.result == "broken" else case.result.replace("_", " ")


def comparison_page(reports: Sequence[Report]) -> str:
    """Return the comparison as one HTML page, case by case."""
    head, *rows = _comparison(reports)
    parts = ["<h1>Comparison</h1>", _table(head, [[_html(cell) for cell in row] for row in rows], numbers=True)]
    by_id = [{case.id: case for case in report.cases} for report in reports]
    names = {case.id: case for report in reports for case in report.cases}
    lines = []
    for name, case in names.items():
        found = [_word(cases.get(name)) for cases in by_id]
        cells = [f'<span class="{_html(word.replace(" ", "_"))}">{_html(word)}</span>' for word in found]
        lines.append([f"<code>{_html(name)}</code> {_html(case.title)}", *cells])
    parts.append(_table(("case", *(report.target for report in reports)), lines))
    return _page("Comparison", "\n".join(parts))
