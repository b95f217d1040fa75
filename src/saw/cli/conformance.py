"""``saw conformance``: try the attack cases from inside a sandbox, read what was found, compare sandboxes."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from saw.cli.operator_options import table
from saw.conformance import catalogue, present, report
from saw.conformance.case import SUITES
from saw.conformance.targets import KINDS, Options, open_target
from saw.conformance.verdict import CaseResult
from saw.errors import ConfigError
from saw.files import write_atomic


def main(argv: list[str]) -> int:
    """Run ``saw conformance run``, ``list`` or ``compare``; 0 no findings, 1 findings or failed, 2 wrong usage."""
    options = _parser().parse_args(argv)
    return {"run": _run, "list": _list, "compare": _compare}[options.command](options)


def _run(options: argparse.Namespace) -> int:
    from saw.conformance.run import run

    cases = catalogue.select(options.suite)
    if options.case:
        unknown = set(options.case) - {case.id for case in cases}
        if unknown:
            raise ConfigError(f"there is no case {min(unknown)!r}", cure="saw conformance list names them")
        cases = tuple(case for case in cases if case.id in options.case)
    folder = Path(options.output)
    about = Options(
        python=options.python, recorder=tuple(options.recorder), proxy=options.proxy, allowed_url=options.allowed_url,
        second_url=options.second_url, graphql_url=options.graphql_url, mcp_url=options.mcp_url,
        redirect_url=options.redirect_url, echo_url=options.echo_url, placeholder=options.placeholder,
        websocket_url=options.websocket_url, inside_url=options.inside_url, mixed_url=options.mixed_url,
        forged_url=options.forged_url, governance=options.governance, ours=options.ours,
    )  # fmt: skip
    started = datetime.now(UTC).isoformat(timespec="seconds")

    def say(suite: str, found: list[CaseResult]) -> None:
        print(present.suite_line(suite, found), file=sys.stderr, flush=True)

    with open_target(options.target, about) as session:
        outcome = run(session, cases, arrivals=tuple(Path(name) for name in options.arrivals), say=say)
        made = report.make(session.name, started, outcome.cases, outcome.problems, session.notes)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.json", report.encode(made))
    write_atomic(folder / "report.html", present.page(made))
    if options.json:
        print(report.encode(made).decode(), end="")
    else:
        print(present.summary(made))
        print(f"report: {folder}/report.json and report.html")
    return 0 if made.ok else 1


def _list(options: argparse.Namespace) -> int:
    cases = catalogue.select(options.suite)
    rows = [
        {
            "case": case.id,
            "control": case.control,
            "suite": case.suite,
            "attack": case.title,
            "twin": case.twin or case.no_twin,
        }
        for case in cases
    ]
    if options.json:
        print(json.dumps({"ok": True, "cases": rows}))
    else:
        print(table(rows, ("case", "control", "suite", "attack", "twin")))
    return 0


def _compare(options: argparse.Namespace) -> int:
    reports = [report.load(name) for name in options.reports]
    if options.html:
        write_atomic(Path(options.html), present.comparison_page(reports))
    if options.json:
        rows = [{"target": one.target, "score": one.summary.score, "suites": _suites(one)} for one in reports]
        print(json.dumps({"ok": True, "reports": rows}))
    else:
        print(present.comparison(reports))
    return 0


def _suites(one: report.Report) -> dict[str, dict[str, float]]:
    return {
        name: {"refused": counts.right + counts.unknown, "applicable": counts.applicable, "score": counts.score}
        for name, counts in one.summary.suites.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saw conformance", description="Try attacks from inside a sandbox; a recorder outside proves what arrived."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runs = commands.add_parser(
        "run", help="try the cases and write the report", description="Try the cases and write the report."
    )
    runs.add_argument("--target", default="bare", help=f"{KINDS} (default: %(default)s)")
    runs.add_argument("--output", default="build/conformance", help="folder of the report (default: %(default)s)")
    runs.add_argument(
        "--python", default="python3", help="Python 3.9 or later inside the sandbox (default: %(default)s)"
    )
    runs.add_argument("--recorder", action="append", default=[], metavar="ADDRESS",
                      help="address of this machine, outside the sandbox, at which the kit records")  # fmt: skip
    runs.add_argument("--arrivals", action="append", default=[], metavar="FILE",
                      help="log of an endpoint outside; what appears in it during the run has arrived")  # fmt: skip
    runs.add_argument("--proxy", default="", metavar="ADDRESS:PORT", help="the sandbox's only way out")
    runs.add_argument("--allowed-url", default="", metavar="URL", help="an https address that its policy allows (GET)")
    runs.add_argument("--second-url", default="", metavar="URL", help="an allowed https address (GET) at another host")
    runs.add_argument("--graphql-url", default="", metavar="URL",
                      help="an https address at which its policy allows the GraphQL query {__typename} and no other")  # fmt: skip
    runs.add_argument("--mcp-url", default="", metavar="URL",
                      help="an https address of an MCP server at which its policy allows the tool note with a text of at most 20 "
                           "characters, and nothing else")  # fmt: skip
    runs.add_argument("--redirect-url", default="", metavar="URL",
                      help="an allowed https address that answers with a redirect to where its query url= says")  # fmt: skip
    runs.add_argument("--echo-url", default="", metavar="URL",
                      help="an allowed https address (GET) at which a credential is put in, and whose service shows the "
                           "headers that it got")  # fmt: skip
    runs.add_argument("--placeholder", default="", metavar="VARIABLE",
                      help="environment variable inside that holds what stands for that credential")  # fmt: skip
    runs.add_argument("--websocket-url", default="", metavar="URL",
                      help="an https address at which its policy allows a WebSocket for texts, and no bytes")  # fmt: skip
    runs.add_argument("--inside-url", default="", metavar="URL",
                      help="an allowed https address (GET) whose name leads to a loopback, private or metadata "
                           "address")  # fmt: skip
    runs.add_argument("--mixed-url", default="", metavar="URL",
                      help="the same, whose name leads to an address outside as well")  # fmt: skip
    runs.add_argument("--forged-url", default="", metavar="URL",
                      help="an allowed https address whose service has a certificate that no authority vouches for")  # fmt: skip
    runs.add_argument("--governance", default="", metavar="FILE",
                      help="governance.yaml of the policy in force there, which says how much memory it gives, and how much its "
                           "temporary directories hold (default: less than a gigabyte)")  # fmt: skip
    runs.add_argument("--ours", action="store_true", help="hold reasons against those of this project's own services")
    runs.add_argument("--case", action="append", default=[], metavar="ID", help="only this case (may be repeated)")
    named = ", ".join(SUITES)
    lists = commands.add_parser("list", help="list the cases", description="List the cases.")
    for one in (runs, lists):
        one.add_argument("--suite", action="append", default=[], help=f"only this suite (may be repeated): {named}")
    compares = commands.add_parser("compare", help="compare reports", description="Compare reports.")
    compares.add_argument("reports", nargs="+", metavar="REPORT", help="report.json of a run")
    compares.add_argument("--html", default="", metavar="FILE", help="write the comparison, case by case, as a page")
    for one in (runs, lists, compares):
        one.add_argument("--json", action="store_true", help="print JSON")
    return parser
