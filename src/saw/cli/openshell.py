"""``saw openshell``: hand the policy in force over to OpenShell, look whether it is held, and what the host lacks (in the VM)."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import msgspec

from saw.cli.answers import read_file
from saw.runtime.openshell import check, config_of, hand_over
from saw.runtime.openshell_gateway import SdkGateway
from saw.runtime.openshell_host import lacks


def main(argv: list[str]) -> int:
    """Run ``apply``, ``status`` or ``preflight``; 0 all is well, 1 a difference, a lack or a refusal, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="saw openshell", description=__doc__)
    parser.add_argument("command", choices=["apply", "status", "preflight"])
    parser.add_argument("--config", default="/etc/saw/openshell.json", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.command == "preflight":
        missing = lacks()
        text = "\n".join(str(one) for one in missing) or "OpenShell can run on this host"
        print(json.dumps({"ok": not missing, "lacks": msgspec.to_builtins(missing)}) if options.json else text)
        return 1 if missing else 0
    config = config_of(read_file(options.config), options.config)
    with contextlib.closing(SdkGateway(config.endpoint, Path(config.tls), config.workspace, config.sandbox)) as gateway:
        if options.command == "status":
            found = check(config, gateway)
            text = "\n".join(found) or "OpenShell holds the policy in force"
            print(json.dumps({"ok": not found, "differences": found}) if options.json else text)
            return 1 if found else 0
        handed = hand_over(config, gateway)
    text = f"OpenShell holds {handed.policy_digest} (revision {handed.revision}) as its revision {handed.version}"
    print(json.dumps({"ok": True, **msgspec.to_builtins(handed)}) if options.json else text)
    return 0
