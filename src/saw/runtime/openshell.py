"""The handover of a policy generation to OpenShell: made, sent, waited for, read back; a sandbox without that is stopped.

The rings do not depend on it: ring 2 decides every call with the whole bundle whatever OpenShell holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from saw import jsontext
from saw.errors import ConfigError, SawError, UnavailableError
from saw.files import write_atomic
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_members
from saw.policy.openshell_message import value
from saw.policy.openshell_runtime import SUPERVISOR, Plan, plan
from saw.runtime import generation, landlock
from saw.runtime.openshell_gateway import Gateway

STATIC = ("filesystem_policy", "landlock", "process")
"""What OpenShell takes at the creation of a sandbox alone."""
_LOOK_S = 0.2


class HandoverFailed(SawError):
    """OpenShell does not hold the policy in force; its sandbox was stopped."""

    code = "handover_failed"


class OpenShellConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/etc/saw/openshell.json``.

    ``image`` names the sandbox's image by digest; ``loaded_within_s`` is in seconds. ``state`` is written by the handover: what
    was read back, or that it stopped the sandbox, which it then starts again itself.
    """

    image: str
    endpoint: str = "127.0.0.1:17670"
    tls: str = "/var/lib/saw-openshell/tls"
    workspace: str = "default"
    sandbox: str = "agent"
    supervisor: str = SUPERVISOR
    accept: tuple[str, ...] = ()
    generations: str = "/run/saw/generations"
    state: str = "/var/lib/saw/openshell/state.json"
    loaded_within_s: float = 120.0

    def __post_init__(self) -> None:
        """Refuse an image that could become another one under the same name."""
        name, _, digest = self.image.partition("@sha256:")
        if not name or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"image {self.image!r} is not named by its digest, as NAME@sha256:…")


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """What was handed over and read back: the policy's digest and revision, and OpenShell's own number and hash of it."""

    policy_digest: str
    revision: int
    version: int
    policy_hash: str
    changed: bool


def hand_over(
    config: OpenShellConfig,
    gateway: Gateway,
    *,
    abi: Callable[[], int] = landlock.abi,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Handed:
    """Make OpenShell's sandbox hold the policy generation in force; return what was read back.

    Raises :class:`HandoverFailed` when the bundle cannot be held there or OpenShell does not hold it; a sandbox that runs is
    stopped then. ``UnavailableError``: no generation, or no gateway, which then cannot stop anything.
    """
    loaded, bundle = _in_force(Path(config.generations))
    try:
        landlock.require(bundle.governance.landlock.minimum_abi, found=abi())
        made = plan(bundle, supervisor=config.supervisor, accept=config.accept)
        wanted = value(json.loads(json.dumps(made.message)))
        changed, version = _send(config, gateway, made, wanted)
        _wait(gateway, version, monotonic() + config.loaded_within_s, monotonic, sleep)
        read = _read_back(gateway, wanted)
    except UnavailableError:
        raise
    except SawError as error:
        raise _stopped(config, gateway, error) from error
    handed = Handed(
        policy_digest=loaded.digest, revision=loaded.revision, version=read[0], policy_hash=read[1], changed=changed
    )
    _note(config, msgspec.json.encode(handed))
    return handed


def check(config: OpenShellConfig, gateway: Gateway) -> list[str]:
    """Return how what OpenShell holds differs from the generation in force, without changing anything; empty: not at all."""
    _, bundle = _in_force(Path(config.generations))
    made = plan(bundle, supervisor=config.supervisor, accept=config.accept)
    phase = gateway.phase()
    if phase is None:
        return [f"there is no sandbox {config.sandbox}"]
    found = [] if phase == "ready" else [f"the sandbox is {phase}"]
    try:
        _read_back(gateway, value(json.loads(json.dumps(made.message))))
    except HandoverFailed as error:
        found.append(error.message)
    return found


def _in_force(root: Path) -> tuple[generation.Loaded, Bundle]:
    name = generation.current(root)
    if name is None or name == generation.CLOSED:
        raise UnavailableError("no policy is in force yet", cure="wait for saw-policyd, and read its journal")
    loaded = generation.load(root, name)
    return loaded, load_members(
        {file: (root / name / file).read_bytes() for file in ("policy.yaml", "governance.yaml")}
    )


def _send(config: OpenShellConfig, gateway: Gateway, made: Plan, wanted: dict[str, Any]) -> tuple[bool, int]:
    """Create the sandbox or replace its policy; return whether that was needed, and the revision's number (0: the newest)."""
    phase = gateway.phase()
    if phase is None:
        gateway.create(made.message, config.image)
        return True, 0
    if phase == "stopped" and not _stopped_here(config):
        reason = f"the sandbox {config.sandbox} is stopped, and not by the handover"
        raise HandoverFailed(reason, cure=f"openshell sandbox start {config.sandbox}, then saw openshell apply")
    there = gateway.in_force()
    held = _words(there.policy)
    if held == wanted:
        if phase == "stopped":
            gateway.start()
        return False, there.version
    static = [field for field in STATIC if held[field] != wanted[field]]
    if static:
        raise HandoverFailed(
            f"{', '.join(static)} changed, which OpenShell takes at the creation of a sandbox alone",
            cure=f"save what is in the sandbox {config.sandbox}, delete it, and hand over again",
        )
    version = gateway.update(made.message)
    if phase == "stopped":
        gateway.start()
    return True, version


def _words(policy: dict[str, Any]) -> dict[str, Any]:
    try:
        return value(policy)
    except PolicyError as error:
        raise HandoverFailed(error.message, cure="let nothing but the handover set its policy") from error


def _wait(
    gateway: Gateway, version: int, until: float, monotonic: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    """Wait until the sandbox has loaded the revision ``version``."""
    while True:
        told = gateway.revision(version)
        if told.state == "loaded" and told.active == told.version:
            return
        if told.state in {"failed", "superseded"}:
            reason = f"revision {told.version} is {told.state} there: {told.error or 'no reason was given'}"
            raise HandoverFailed(reason, cure="saw policy openshell shows what was sent")
        if monotonic() >= until:
            reason = f"revision {told.version} is still {told.state} there, and {told.active} is active"
            raise HandoverFailed(reason, cure="look at the sandbox's log, and hand over again")
        sleep(_LOOK_S)


def _read_back(gateway: Gateway, wanted: dict[str, Any]) -> tuple[int, str]:
    """Return number and hash of the policy that OpenShell holds, which must be ``wanted`` and nothing besides."""
    there = gateway.in_force()
    if there.source != "sandbox":
        raise HandoverFailed(
            f"a {there.source} policy of the gateway is in force instead",
            cure="remove the global policy",
        )
    if there.on_invalid != "fail_closed":
        raise HandoverFailed(
            f"a policy that does not load would leave the one before in force ({there.on_invalid or 'not said'})",
            cure="set policy_validation_failure_mode to fail_closed",
        )
    if there.middlewares:
        raise HandoverFailed(f"{there.middlewares} middlewares see the calls", cure="take them out of gateway.toml")
    held = _words(there.policy)
    if held != wanted:
        parts = ", ".join(sorted(key for key in wanted if held.get(key) != wanted[key]))
        raise HandoverFailed(f"it holds another policy ({parts})", cure="hand over again: saw openshell apply")
    return there.version, there.digest


def _note(config: OpenShellConfig, content: bytes) -> None:
    state = Path(config.state)
    state.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(state, content)


def _stopped_here(config: OpenShellConfig) -> bool:
    """Tell whether the handover itself stopped the sandbox; what a person stopped stays so."""
    try:
        return "stopped" in jsontext.decode(Path(config.state).read_bytes(), kind=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return False


def _stopped(config: OpenShellConfig, gateway: Gateway, error: SawError) -> HandoverFailed:
    """Stop the sandbox, if there is one that runs, and return what is to be raised."""
    try:
        phase = gateway.phase()
        if phase is None:
            ending = "there is no sandbox"
        elif phase == "stopped":
            ending = "its sandbox is stopped"
        else:
            gateway.stop()
            _note(config, msgspec.json.encode({"stopped": error.message}))
            ending = "its sandbox was stopped"
    except SawError as second:
        ending = f"its sandbox could not be stopped ({second.message})"
    return HandoverFailed(f"OpenShell does not hold the policy in force: {error.message}; {ending}", cure=error.cure)


def config_of(raw: bytes, name: str) -> OpenShellConfig:
    """Read the configuration; raise :class:`ConfigError` with the reason."""
    try:
        return jsontext.decode(raw, kind=OpenShellConfig)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{name}: {error}", cure="correct it, or apply the role runtime_openshell again") from error
