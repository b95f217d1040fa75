"""The sandbox's network namespace: one link to ring 1, no route, no IPv6, default drop on both sides.

Every step converges, so an interrupted or repeated run ends in the same state; rules are loaded before the link exists.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from saw import jsontext
from saw.errors import SawError
from saw.runtime import netns_rules
from saw.runtime.netns_rules import Ruleset

_DISABLE_IPV6 = """cd /proc/sys/net/ipv6/conf
for family do [ "$(cat "$family/disable_ipv6")" = 1 ] || echo 1 >"$family/disable_ipv6"; done"""


class NetnsError(SawError):
    """The sandbox's network could not be brought up, down or read."""

    code = "sandbox_network"


@dataclass(frozen=True)
class SandboxNet:
    """Names and addresses; the defaults are those of ``docs/architecture.md``."""

    name: str = "saw-sandbox"
    vm_interface: str = "sawveth0"
    sandbox_interface: str = "eth0"
    vm_address: str = "10.200.0.1"
    sandbox_address: str = "10.200.0.2"
    prefix: int = 30
    port: int = 3128

    @property
    def inside(self) -> tuple[str, ...]:
        """Return the command prefix that runs a program in the namespace."""
        return ("ip", "netns", "exec", self.name)

    def sandbox_rules(self) -> Ruleset:
        """Return the rules inside the namespace."""
        return netns_rules.sandbox_rules(self.vm_address, self.port)

    def veth_rules(self) -> Ruleset:
        """Return the VM's rules for the link."""
        return netns_rules.veth_rules(self.vm_interface, self.vm_address, self.sandbox_address, self.port)

    def vm_rules(self, number: int, daemon_uids: tuple[int, ...], reporter_uids: tuple[int, ...] = ()) -> Ruleset:
        """Return the VM-wide rules of workspace ``number``."""
        return netns_rules.vm_rules(
            number, self.vm_interface, self.port, daemon_uids, self.vm_address, reporter_uids=reporter_uids
        )


def _run(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetnsError(f"{command[0]} could not be run: {error}", cure="install iproute2; run as root") from error
    if answer.returncode != 0:
        raise NetnsError(f"`{' '.join(command)}` failed: {answer.stderr.strip()}", cure="run as root, see the reason")
    return answer.stdout


def _succeeds(*command: str) -> bool:
    try:
        _run(*command)
    except NetnsError:
        return False
    return True


def up(net: SandboxNet, step: Callable[[str], None] = lambda _: None) -> bool:
    """Bring the network up; return whether anything had to change. ``step`` is called with the name of each step done.

    Raises :class:`NetnsError` or :class:`~saw.runtime.netns_rules.RulesError`.
    """
    changed = _ensure_namespace(net)
    step("namespace")
    changed |= netns_rules.load(net.sandbox_rules(), net.inside)
    step("sandbox-rules")
    changed |= netns_rules.load(net.veth_rules())
    step("vm-rules")
    if _link_problems(net):
        if _exists(net.vm_interface):
            _run("ip", "link", "delete", net.vm_interface)
        _run(*_ip_inside(net), "link", "set", "lo", "up")
        names = ("name", net.vm_interface, "type", "veth", "peer", "name", net.sandbox_interface)
        _run("ip", "link", "add", *names, "netns", net.name)
        step("link")
        Path(f"/proc/sys/net/ipv6/conf/{net.vm_interface}/disable_ipv6").write_text("1", encoding="ascii")
        _run("ip", "address", "add", f"{net.vm_address}/{net.prefix}", "dev", net.vm_interface)
        inside = _ip_inside(net)
        _run(*inside, "address", "add", f"{net.sandbox_address}/{net.prefix}", "dev", net.sandbox_interface)
        step("addresses")
        _run("ip", "link", "set", net.vm_interface, "up")
        _run(*inside, "link", "set", net.sandbox_interface, "up")
        changed = True
    problems = check(net)
    if problems:
        raise NetnsError(
            f"the sandbox's network is not as intended: {'; '.join(problems)}", cure="run net-down, then net-up"
        )
    return changed


def down(net: SandboxNet) -> bool:
    """Take the network down; return whether anything was there. The VM's rules for the link go last."""
    changed = False
    if _exists(net.vm_interface):
        _run("ip", "link", "delete", net.vm_interface)
        changed = True
    if Path("/run/netns", net.name).exists():
        _run("ip", "netns", "delete", net.name)
        changed = True
    table = (netns_rules.FAMILY, net.veth_rules().table)
    if _succeeds("nft", "list", "table", *table):
        _run("nft", "delete", "table", *table)
        changed = True
    return changed


def check(net: SandboxNet) -> list[str]:
    """Return everything that differs from the intended state, as sentences; empty when all is right."""
    if not _usable(net):
        return [f"network namespace {net.name} does not exist"]
    problems = netns_rules.check(net.sandbox_rules(), net.inside) + netns_rules.check(net.veth_rules())
    problems += _link_problems(net)
    disabled = _run(*net.inside, "cat", "/proc/sys/net/ipv6/conf/all/disable_ipv6").strip()
    if disabled != "1":
        problems.append("IPv6 is enabled in the sandbox")
    for family in ("-4", "-6"):
        routes = jsontext.decode(_run(*_ip_inside(net), family, "-j", "route", "show") or "[]")
        if any(route.get("dst") == "default" or "gateway" in route for route in routes):
            problems.append("the sandbox has a default route")
    return problems


def _ip_inside(net: SandboxNet) -> tuple[str, ...]:
    return ("ip", "-n", net.name)


def _usable(net: SandboxNet) -> bool:
    return _succeeds(*net.inside, "true")


def _exists(interface: str) -> bool:
    return Path("/sys/class/net", interface).exists() or _succeeds("ip", "link", "show", "dev", interface)


def _ensure_namespace(net: SandboxNet) -> bool:
    changed = False
    if not _usable(net):
        if Path("/run/netns", net.name).exists():
            _run("ip", "netns", "delete", net.name)
        _run("ip", "netns", "add", net.name)
        changed = True
    _run(*net.inside, "sh", "-ec", _DISABLE_IPV6, "sh", "all", "default")
    return changed


def _link_problems(net: SandboxNet) -> list[str]:
    problems = []
    outside = (("ip",), net.vm_interface, net.vm_address)
    inside = (_ip_inside(net), net.sandbox_interface, net.sandbox_address)
    for command, interface, address in (outside, inside):
        try:
            links = jsontext.decode(_run(*command, "-j", "address", "show", "dev", interface))
        except NetnsError:
            problems.append(f"interface {interface} does not exist")
            continue
        link = next(item for item in links if item)
        found = [f"{a['local']}/{a['prefixlen']}" for a in link.get("addr_info", [])]
        if found != [f"{address}/{net.prefix}"]:
            problems.append(f"interface {interface} has the addresses {found}, not {address}/{net.prefix}")
        if "UP" not in link.get("flags", []):
            problems.append(f"interface {interface} is down")
    return problems
