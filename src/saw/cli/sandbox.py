"""``saw sandbox``: the sandbox and its network inside the VM."""

from __future__ import annotations

import argparse
import json
import os
import pwd
from pathlib import Path

from saw.addressing import HIGHEST, is_number
from saw.errors import SawError
from saw.runtime import netns, netns_rules

ATTACH = "/opt/saw/libexec/saw-attach"
WORKSPACE = Path("/run/saw/workspace.json")
EGRESS_USER = "saw-egress"
REPORTERS = frozenset({"saw-edr", "saw-telemetry"})
"""Report to the broker where the image has endpoint detection or telemetry; elsewhere there are no such users."""


def main(argv: list[str]) -> int:
    """Run one subcommand; see ``saw sandbox --help``."""
    if argv[:1] == ["attach"]:
        os.execv(ATTACH, [ATTACH, *argv[1:]])  # noqa: S606
    if argv[:1] in (["forward"], ["forward-serve"]) and len(argv) == 1:
        from saw.runtime import forward

        return forward.enter(os.environ) if argv == ["forward"] else forward.serve()
    parser = argparse.ArgumentParser(prog="saw sandbox", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("net-up", "bring up the sandbox's network and the VM's rules (converges)"),
        ("net-down", "take down the sandbox's network; the VM-wide rules stay"),
        ("check", "compare network and rules with what they must be"),
        ("prepare", "write launch files and units of the loaded generation"),
        ("start-agents", "start always-on agents that were not started yet as the loaded generation has them"),
        ("shims", "write saw-run, saw-attach and saw-mcp-connect"),
        ("attach", "open the persistent terminal, or run SSH_ORIGINAL_COMMAND, in the sandbox"),
        ("forward", "carry connections to the port that SSH_ORIGINAL_COMMAND names in the sandbox's network"),
        ("forward-serve", "make those connections (saw-forward@.service, in the sandbox's network)"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--json", action="store_true", help="machine-readable answer on stdout")
        if name in {"prepare", "start-agents"}:
            command.add_argument("--generation", type=Path, default=Path("/run/saw/generations/current"))
            command.add_argument("--units", default="/run/systemd/system", help="where the units lie")
        if name == "shims":
            command.add_argument("--directory", type=Path, default=Path("/opt/saw/libexec"))
    options = parser.parse_args(argv)
    changed: list[str] | bool = False
    problems: list[str] = []
    if options.command == "net-up":
        changed = _net_up()
    elif options.command == "net-down":
        changed = netns.down(netns.SandboxNet())
    elif options.command == "check":
        problems = _check()
    elif options.command == "prepare":
        changed = _prepare(options.generation, options.units)
    elif options.command == "start-agents":
        changed = _start_agents(options.generation, options.units)
    else:
        from saw.runtime import sandbox, sandbox_prepare

        changed = sandbox_prepare.write_shims(options.directory, sandbox.RuntimePaths())
    if options.json:
        print(json.dumps({"ok": not problems, "changed": changed, "problems": problems}))
    else:
        print("\n".join(problems) or ("changed" if changed else "as it must be"))
    return 1 if problems else 0


def vm_rules(net: netns.SandboxNet) -> netns_rules.Ruleset | None:
    """Return the VM-wide rules for this workspace, or None before ``/run/saw/workspace.json`` is written."""
    try:
        number = json.loads(WORKSPACE.read_bytes())["number"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise netns.NetnsError(f"{WORKSPACE} is not usable: {error}", cure="see saw-bootstrap.service") from error
    if not is_number(number):
        raise netns.NetnsError(
            f"{WORKSPACE}: number must be 1 to {HIGHEST}, not {number!r}", cure="see saw-bootstrap.service"
        )
    uids = [0]
    try:
        uids.append(pwd.getpwnam(EGRESS_USER).pw_uid)
    except KeyError as error:
        raise netns.NetnsError(f"user {EGRESS_USER} does not exist", cure="install the role that creates it") from error
    reporters = tuple(one.pw_uid for one in pwd.getpwall() if one.pw_name in REPORTERS)
    return net.vm_rules(number, tuple(uids), reporters)


def _net_up() -> bool:
    net = netns.SandboxNet()
    rules = vm_rules(net)
    changed = netns_rules.load(rules) if rules is not None else False
    return netns.up(net) or changed


def _check() -> list[str]:
    net = netns.SandboxNet()
    problems = netns.check(net)
    rules = vm_rules(net)
    if rules is not None:
        problems += netns_rules.check(rules)
    from saw.runtime import sandbox, sandbox_prepare

    try:
        user = sandbox.load_spec().user
    except SawError as error:
        return [*problems, str(error)]
    shell = sandbox_prepare.login_shell_problem(user)
    return [*problems, shell] if shell else problems


def _prepare(generation: Path, units: str) -> list[str]:
    from saw.runtime import sandbox, sandbox_prepare, sandbox_units

    spec = sandbox.load_spec(generation)
    version = sandbox_units.systemd_version()
    sandbox_units.verify_units(sandbox_units.compile_units(spec, systemd=version))
    changed = sandbox_prepare.bound(spec, unit_directory=units)
    # Before the home: what an agent did there must not keep it running under a policy that no longer has it so.
    changed += sandbox_prepare.retire(spec, sandbox_units.stop_units, unit_directory=units)
    return changed + sandbox_prepare.prepare(spec, unit_directory=units)


def _start_agents(generation: Path, units: str) -> list[str]:
    from saw.runtime import sandbox, sandbox_agents

    # The folder itself, so that digest and policy are of one generation.
    generation = generation.resolve()
    spec = sandbox.load_spec(generation)
    return sandbox_agents.start_agents(spec, generation.name, sandbox_agents.start_unit, unit_directory=units)
