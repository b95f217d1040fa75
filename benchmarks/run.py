"""All measurements of ``make bench``: prints a table, writes ``build/bench.json``.

    python benchmarks/run.py [--only NAME ...] [--quick] [--no-lab] [--output FILE]

Every ratio compares two things measured in the same run. A part that cannot run here (no root, no Envoy, no running lab)
leaves a row that says so and what to run. A running lab (``make workspace``) is used: it is converged, published to, and its
workspace is killed and released; ``--no-lab`` leaves it alone. With ``--only``, rows of other parts in the file stay. Exit
status 1: a part failed. A missed goal does not fail the run: what it took is a fact about this machine as well.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT / "src")]

import results  # noqa: E402 - the modules beside this one

from saw.lab.topology import Lab, find_lab  # noqa: E402


def quotes(options: argparse.Namespace) -> list[results.Result]:
    """Quote checks per second."""
    import quote_verify

    return quote_verify.measure(0.5 if options.quick else 2.0)


def matcher(options: argparse.Namespace) -> list[results.Result]:
    """Policy decision and policy load."""
    import policy_decision

    return policy_decision.measure(0.3 if options.quick else 1.5)


def calls(options: argparse.Namespace) -> list[results.Result]:
    """A call through both rings and each alone, calls at a time, decisions per core."""
    import governed_call

    return governed_call.measure(200 if options.quick else 1000)


def kinds(options: argparse.Namespace) -> list[results.Result]:
    """Streams, tools and large answers through both rings; tools over stdio."""
    import call_kinds
    import mcp_stdio

    count = 20 if options.quick else 300
    return [*call_kinds.measure(count), *mcp_stdio.measure(count)]


def crowd(options: argparse.Namespace) -> list[results.Result]:
    """Connections of many workspaces on one ring 2."""
    import many_workspaces

    return many_workspaces.measure(60 if options.quick else 1000)


def sandbox(options: argparse.Namespace) -> list[results.Result]:
    """Start of a command in the sandbox."""
    import sandbox_start

    return sandbox_start.measure(20 if options.quick else 100)


def files(options: argparse.Namespace) -> list[results.Result]:
    """Work on many files in the sandbox."""
    import file_work

    return file_work.measure(1 if options.quick else 10)


def publish(options: argparse.Namespace) -> list[results.Result]:
    """From a publication to its enforcement."""
    import publish_enforced

    return publish_enforced.measure(5 if options.quick else 20)


def kill(options: argparse.Namespace) -> list[results.Result]:
    """From a kill to the first refused call."""
    import kill_refused

    return kill_refused.measure(5 if options.quick else 25)


def broker(options: argparse.Namespace) -> list[results.Result]:
    """Certificates, approvals and audit events of the broker."""
    import broker_rates

    return broker_rates.measure(20 if options.quick else 200)


def portal(options: argparse.Namespace) -> list[results.Result]:
    """Pages of the portal."""
    import portal_pages

    return portal_pages.measure(5 if options.quick else 100)


def bastion(options: argparse.Namespace) -> list[results.Result]:
    """First byte through the bastion, and the end of a live session."""
    import bastion_paths

    return bastion_paths.measure(2 if options.quick else 25)


def lab(_: argparse.Namespace) -> list[results.Result]:
    """What the last runs of the lab recorded."""
    import lab_figures

    return lab_figures.read(find_lab(ROOT).build)


def on_the_lab(
    options: argparse.Namespace, names: tuple[str, ...], part: Callable[[Lab], list[results.Result]]
) -> list[results.Result]:
    """Return the rows of ``part`` on the running lab; without one, rows that say what to run."""
    import lab_paths

    found = find_lab(ROOT)
    if options.no_lab:
        return lab_paths.absent(names, lab_paths.LEFT_ALONE)
    return part(found) if lab_paths.running(found) else lab_paths.absent(names, lab_paths.NO_LAB)


def converge(options: argparse.Namespace) -> list[results.Result]:
    """A second converge of the running lab."""
    import lab_figures

    return on_the_lab(options, ("second_converge", "second_converge_changes"), lab_figures.converge)


def site(options: argparse.Namespace) -> list[results.Result]:
    """The playbook site without a change, on hosts of its own (and on the tree of a golden image)."""
    import site_converge

    return site_converge.measure(1 if options.quick else 3)


def workspace_publish(options: argparse.Namespace) -> list[results.Result]:
    """From a publication to its enforcement in the running workspace."""
    import lab_paths

    count = 2 if options.quick else 10
    return on_the_lab(options, lab_paths.PUBLISH_ROWS, lambda found: lab_paths.publish(found, count))


def workspace_kill(options: argparse.Namespace) -> list[results.Result]:
    """From `saw workspace kill` to the first refused call of the running workspace (releases it each time)."""
    import lab_paths

    count = 1 if options.quick else 3
    return on_the_lab(options, lab_paths.KILL_ROWS, lambda found: lab_paths.kill(found, count))


PARTS: dict[str, Callable[[argparse.Namespace], list[results.Result]]] = {
    "quotes": quotes,
    "matcher": matcher,
    "calls": calls,
    "kinds": kinds,
    "crowd": crowd,
    "sandbox": sandbox,
    "files": files,
    "publish": publish,
    "kill": kill,
    "broker": broker,
    "portal": portal,
    "bastion": bastion,
    "lab": lab,
    "converge": converge,
    "site": site,
    "workspace-publish": workspace_publish,
    "workspace-kill": workspace_kill,
}
NEEDS_ROOT = frozenset({"calls", "kinds", "crowd", "sandbox", "files", "kill", "bastion", "site"})


def measure(name: str, options: argparse.Namespace) -> tuple[list[results.Result], bool]:
    """Run one part; return its rows and whether it ran. Its failure is a row, so that the other parts still run."""
    if name in NEEDS_ROOT and os.geteuid() != 0:
        return [results.result(name, None, "", note="not measured: needs root")], True
    command = f"python benchmarks/run.py --only {name}" + (" --quick" if options.quick else "")
    try:
        rows = PARTS[name](options)
    except Exception as error:  # noqa: BLE001 - shown, recorded, and the exit status says it
        return [results.result(name, None, "", command=command, note=f"failed: {type(error).__name__}: {error}")], False
    return [row if row.command else msgspec.structs.replace(row, command=command) for row in rows], True


def merged(path: Path, fresh: list[results.Result]) -> list[results.Result]:
    """Return the rows of ``path`` with ``fresh`` ones in place of those that the same commands measured."""
    try:
        old = msgspec.json.decode(path.read_bytes(), type=list[results.Result])
    except (OSError, msgspec.MsgspecError):
        old = []
    names = {row.name for row in fresh}
    parts = {_part(row) for row in fresh}
    kept = [row for row in old if row.name not in names and _part(row) not in parts]
    order = {f"python benchmarks/run.py --only {name}": place for place, name in enumerate(PARTS)}
    return sorted(kept + fresh, key=lambda row: order.get(_part(row), len(order) - 2))


def _part(row: results.Result) -> str:
    return row.command.removesuffix(" --quick")


def main(argv: Iterable[str] | None = None) -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="this part alone (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="few samples: whether it runs, not how fast")
    parser.add_argument(
        "--no-lab", action="store_true", help="leave a running lab alone (it is converged, published to, killed)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=find_lab(ROOT).build / "bench.json",
        help="where the rows go (SAW_BUILD is heeded)",
    )
    options = parser.parse_args(None if argv is None else list(argv))
    rows: list[results.Result] = []
    healthy = True
    chosen = [name for name in PARTS if not options.only or name in options.only]
    for number, name in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {name}: {(PARTS[name].__doc__ or '').strip()}", flush=True)
        begin = time.monotonic()
        fresh, ran = measure(name, options)
        healthy &= ran
        print(results.table(fresh))
        print(f"        {'done' if ran else 'FAILED'} in {time.monotonic() - begin:.1f} s", flush=True)
        rows += fresh
    if options.only:
        rows = merged(options.output, rows)
    results.write(rows, options.output)
    print(f"\n{results.table(rows)}\n\n{len(rows)} rows in {options.output}")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
