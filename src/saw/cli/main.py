"""Entry point of ``saw``: picks the area by its first word and imports nothing else.

Every area module offers ``main(argv: list[str]) -> int`` and parses its own arguments. Exit codes: 0 done, 1 refused or
failed with a reason, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile

import saw
from saw.errors import SawError

AREAS: dict[str, tuple[str, str]] = {
    "policy": ("saw.cli.policy", "author, check, sign, verify and publish policy bundles"),
    "workspace": ("saw.cli.workspace", "list, create, stop, start, kill and destroy workspaces; bootstrap (in the VM)"),
    "job": ("saw.cli.job", "run lifecycle playbooks through the broker: ask, watch, cancel, resume"),
    "ls": ("saw.cli.ls", "list workspaces; short for saw workspace list"),
    "ssh": ("saw.cli.ssh", "attach to a workspace with a certificate of minutes"),
    "exec": ("saw.cli.exec", "run one command in a workspace, word for word"),
    "cp": ("saw.cli.cp", "copy files and folders to and from a workspace"),
    "expose": ("saw.cli.expose", "look at a server in a workspace from this machine, by a grant"),
    "sessions": ("saw.cli.sessions", "list sessions that went, or go, through the bastion"),
    "session": ("saw.cli.session", "end a live session, grant ports; run the recorder (on the bastion)"),
    "replay": ("saw.cli.replay", "play the recording of a session, once it is verified"),
    "agent": ("saw.cli.agent", "register agents, retire them, have one succeeded by another"),
    "sponsor": ("saw.cli.sponsor", "the people on whose behalf agents act; disable one who left"),
    "delegation": ("saw.cli.delegation", "hand tasks to agents, take them back, verify a signed delegation"),
    "review": ("saw.cli.review", "look at calls that wait for people, decide under a key, verify receipts"),
    "notify": ("saw.cli.notify", "what people were told by webhook and e-mail; a test of a channel, another try"),
    "login": ("saw.cli.login", "sign in with single sign-on"),
    "logout": ("saw.cli.logout", "end that session"),
    "whoami": ("saw.cli.whoami", "tell who is signed in, and with which roles"),
    "usage": ("saw.cli.usage", "what agents used of their workspaces: processors, memory, disk"),
    "budget": ("saw.cli.budget", "what inference costs, what is left, and an export for cost tools"),
    "inference": ("saw.cli.inference", "read what is kept of calls of models (on a perimeter host)"),
    "audit": ("saw.cli.audit", "read and verify the audit trail"),
    "image": ("saw.cli.image", "golden image records"),
    "baseline": ("saw.cli.baseline", "scores of hardening scans, their floor and waivers"),
    "edr": ("saw.cli.edr", "endpoint detection on this host: its health and its findings, a scan now"),
    "telemetry": (
        "saw.cli.telemetry",
        "what this host's journal says, as OCSF events: whether they leave, and the newest",
    ),
    "patch": (
        "saw.cli.patch",
        "security updates of this host: pending, held, overdue; a run now, a restart in its window",
    ),
    "gpu": ("saw.cli.gpu", "GPUs: the driver in an image, a look at the devices, the wipe when a user goes"),
    "data-disk": ("saw.cli.data_disk", "the encrypted data disk: open it (in the VM), the operator's recovery key"),
    "drift": ("saw.cli.drift", "hosts that are not as the plays want them, and hosts that could not be asked"),
    "lab": ("saw.cli.lab", "the embedded default: from an empty machine to a governed workspace"),
    "vm": ("saw.cli.vm", "the qemu driver (on a hypervisor)"),
    "broker": ("saw.cli.broker", "run the broker"),
    "worker": ("saw.cli.worker", "run the lifecycle jobs of a broker"),
    "gateway": ("saw.cli.gateway", "run the gatekeeper of ring 2"),
    "policyd": ("saw.cli.policyd", "run the policy agent (in the VM)"),
    "attestd": ("saw.cli.attestd", "run the attestation agent (in the VM)"),
    "decide": ("saw.cli.decide", "run the decision service of ring 1 (in the VM)"),
    "sandbox": ("saw.cli.sandbox", "set up the sandbox and its network (in the VM)"),
    "openshell": ("saw.cli.openshell", "hand the policy in force over to NVIDIA OpenShell (in the VM)"),
    "run": ("saw.cli.run", "run one command in the sandbox (in the VM)"),
    "conformance": ("saw.cli.conformance", "try attacks from inside a sandbox, ours or another"),
    "mcp": ("saw.cli.mcp", "run a stdio MCP server behind its argument rules (in the VM)"),
}


def usage() -> str:
    """Return the overview that ``saw --help`` prints."""
    lines = ["usage: saw AREA …", "", "areas:"]
    lines += [f"  {name:<10} {text}" for name, (_, text) in AREAS.items()]
    return "\n".join([*lines, "", "saw AREA --help tells more; saw --version prints the version."])


def main(argv: list[str] | None = None) -> int:
    """Run ``saw`` with ``argv`` (default: the process's arguments) and return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"saw {saw.__version__}")
        return 0
    area = AREAS.get(arguments[0])
    if area is None:
        print(f"saw: there is no area {arguments[0]!r}; saw --help lists them", file=sys.stderr)
        return 2
    module = importlib.import_module(area[0])
    try:
        return int(module.main(arguments[1:]))
    except SawError as error:
        return _failed(arguments, error)
    except OSError as error:
        from saw.files import storage_error

        full = storage_error(error, os.getcwd(), tempfile.gettempdir())  # noqa: PTH109 - what it is, not where
        if full is None:
            raise
        return _failed(arguments, full)
    except KeyboardInterrupt:
        print(f"saw {arguments[0]}: interrupted", file=sys.stderr)
        return 130


def _failed(arguments: list[str], error: SawError) -> int:
    """Say why a command failed, as JSON too where that is wanted; standard output may be on the full disk itself."""
    with contextlib.suppress(OSError):
        if "--json" in arguments:
            print(json.dumps({"ok": False, "error": error.as_dict()}), flush=True)
    with contextlib.suppress(OSError):
        print(f"saw {arguments[0]}: {error}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
