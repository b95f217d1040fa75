"""``saw lab``: the embedded default on this machine (root)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from saw.lab.steps import Progress
from saw.lab.topology import find_lab

LIFECYCLE = ("start", "stop", "rebuild", "kill", "destroy")


def main(argv: list[str]) -> int:
    """Run ``saw lab``."""
    parser = argparse.ArgumentParser(
        prog="saw lab", description="The embedded default: one machine, no cloud, no cluster."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    bring_up = verbs.add_parser("up", help="bring everything up, run the demonstration, print the control report")
    bring_up.add_argument(
        "--keep-image", action="store_true", help="use the newest image even if its inputs have changed"
    )
    down = verbs.add_parser("down", help="end everything; state stays for the next `up`")
    down.add_argument("--purge", action="store_true", help="remove the state too (images and caches stay)")
    verbs.add_parser("status", help="what runs").add_argument("--json", action="store_true")
    for name in LIFECYCLE:
        sub = verbs.add_parser(name, help=f"{name} the demonstration workspace")
        sub.add_argument("--reason", default=f"{name} by operator", help="why; it is audited")
    options = parser.parse_args(argv)
    lab = find_lab()
    from saw.lab import main_job, up

    if options.verb == "up":
        return main_job.bring_up(lab, keep_image=options.keep_image)
    if options.verb == "down":
        up.tear_down(lab, purge=options.purge)
        return 0
    if options.verb == "status":
        state = {host.name: {"address": host.address, "running": host.running()} for host in lab.hosts()}
        print(json.dumps(state) if options.json else "\n".join(f"{name}: {value}" for name, value in state.items()))
        return 0
    progress = Progress(total=1)
    with up.exclusive(lab), progress.step(f"{options.verb} the workspace"):
        up.lifecycle(up.Bringup(lab, progress), options.verb, options.reason)
    return 0


def context_path() -> Path:
    """Return the context file of the lab around the working directory."""
    return find_lab().context_file
