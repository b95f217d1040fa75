"""Where data of a class may go: the destinations of a bundle held against host globs, by the texts that globs accept.

``data_classes`` says what a workspace works with, not what a call carries: nothing looks into calls for it. What it says of
destinations holds all the same, because a bundle with a destination beyond them does not load. That a service of an inference
route is for fewer classes does not widen ``only_to``: what a call holds is said by those who make it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlsplit

from saw.policy import globs
from saw.policy.decode import Steps, path_text
from saw.policy.governance import Governance
from saw.policy.model import Policy
from saw.policy.partial import Unknown
from saw.policy.reach_automata import Budget, Glob, TooLarge, partition
from saw.policy.reach_domains import host_name

MAX_WORK = 1_000_000
"""Most work that a bundle's destinations may take while it loads, in transitions of automata."""
_STEP = 8
"""What a glob to match, or a character of one to build, costs of it."""


class Destination(NamedTuple):
    """A host glob that calls may go to, and the way to it in its file; ``in_policy``: in ``policy.yaml``."""

    host: str
    steps: Steps
    in_policy: bool


def destinations(policy: Policy, governance: Governance) -> Iterator[Destination]:
    """Yield where calls may go: the host of each endpoint, and the upstream of each inference route."""
    with suppress(Unknown):
        for key, rule in policy.network_policies.items():
            with suppress(Unknown):
                for index, endpoint in enumerate(rule.endpoints):
                    with suppress(Unknown):
                        steps = ("network_policies", key, "endpoints", index, "host")
                        yield Destination(endpoint.host.lower(), steps, True)
    with suppress(Unknown):
        for index, route in enumerate(governance.inference.routes):
            with suppress(Unknown):
                at: Steps = ("inference", "routes", index)
                yield Destination(host_of(route.upstream), (*at, "upstream"), False)
                for place, way in enumerate(route.upstreams):
                    with suppress(Unknown):
                        yield Destination(host_of(way.upstream), (*at, "upstreams", place, "upstream"), False)


def host_of(upstream: str) -> str:
    """Return the host of a model service in lower case; empty where it has none."""
    return (urlsplit(upstream).hostname or "").lower()


def within(host: str, wholes: Sequence[str], budget: Budget) -> bool:
    """Return whether every name that ``host`` accepts is accepted by one of ``wholes``; raises :class:`TooLarge`."""
    budget.spend(_STEP * (len(wholes) if globs.is_exact(host) else len(host) + sum(map(len, wholes))))
    if not wholes:
        return False
    if globs.is_exact(host):
        return any(globs.host_glob(whole.lower()).fullmatch(host) for whole in wholes)
    parts = [Glob.host(host), *(Glob.host(whole.lower()) for whole in wholes)]
    return not any(found.mask & 1 and not found.mask >> 1 for found in partition(parts, host_name(), (), budget))


def strays(policy: Policy, governance: Governance, hosts: Sequence[str], budget: Budget) -> Iterator[Destination]:
    """Yield the destinations that do not lie within ``hosts``; one that cannot be compared in bounds counts as outside."""
    known: dict[str, bool] = {}
    for destination in destinations(policy, governance):
        if destination.host not in known:
            try:
                known[destination.host] = within(destination.host, hosts, budget)
            except (TooLarge, globs.GlobError):
                known[destination.host] = False
        if not known[destination.host]:
            yield destination


def data_fault(policy: Policy, governance: Governance, data_class: str, hosts: Sequence[str]) -> tuple[str, str] | None:
    """Return why data of a class could leave ``hosts`` (none: why it is handled at all) and the rule, or ``None``."""
    if data_class not in governance.data_classes.handles:
        return None
    if not hosts:
        return f"{data_class} data is handled", "data_classes.handles"
    for stray in strays(policy, governance, hosts, Budget(MAX_WORK)):
        return f"{data_class} data is handled, and {stray.host} can be reached", path_text(stray.steps)
    return None
