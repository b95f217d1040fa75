"""The dry run: what each engine's own checker says of a candidate generation, before anything is switched.

In this order: the loader of ``saw-decide``, the sandbox's compiler with the kernel's Landlock, ``nft -c``, ``systemd-analyze
verify`` and ``envoy --mode validate``. What one of the last three accepted once it is not asked again.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from saw.errors import SawError
from saw.files import write_atomic
from saw.runtime import generation, landlock, netns_rules, ring1, sandbox, sandbox_units
from saw.runtime.netns import SandboxNet
from saw.runtime.policyd_config import PolicydConfig
from saw.runtime.sandbox import RuntimePaths, SandboxSpec

_T = TypeVar("_T")
_WORDS = 500
_REMEMBERED = 32


class CandidateRefused(SawError):
    """A checker does not accept the candidate; the message holds the end of its words."""

    code = "candidate_refused"


class DryRun:
    """Asks the checkers of this machine. ``paths`` and ``net`` are what the sandbox is compiled with here."""

    def __init__(
        self,
        config: PolicydConfig,
        settings: ring1.Ring1,
        *,
        paths: RuntimePaths | None = None,
        net: SandboxNet | None = None,
    ) -> None:
        self._config = config
        self._settings = settings
        self._paths = paths or RuntimePaths()
        self._net = net or SandboxNet(vm_address=config.listen_address, port=config.listen_port)

    @functools.cached_property
    def _systemd(self) -> int:
        return sandbox_units.systemd_version()

    def check(self, digest: str, directory: Path) -> None:
        """Ask all about the generation ``digest`` that lies in ``directory``; raises :class:`CandidateRefused`."""
        self._ask("saw-decide", lambda: generation.load_from(directory, digest))
        spec = self._ask("the sandbox", lambda: self._sandbox(directory))
        self._ask("nft", self._packet_filter)
        self._ask("systemd", lambda: self._units(spec))
        self._envoy(digest, directory)

    def _ask(self, engine: str, question: Callable[[], _T]) -> _T:
        try:
            return question()
        except (SawError, OSError, ValueError, KeyError, AttributeError, TypeError, msgspec.MsgspecError) as error:
            raise CandidateRefused(f"{engine} refused the candidate: {str(error)[-_WORDS:]}") from error

    def _sandbox(self, directory: Path) -> SandboxSpec:
        spec = sandbox.load_spec(directory, paths=self._paths)
        landlock.require(spec.minimum_abi)
        sandbox_units.compile_launch_files(spec)
        return spec

    def _packet_filter(self) -> None:
        for rules in (self._net.sandbox_rules(), self._net.veth_rules()):
            self._once("nft", rules.load_document(), lambda rules=rules: netns_rules.dry_run(rules))  # type: ignore[misc]

    def _units(self, spec: SandboxSpec) -> None:
        units = sandbox_units.compile_units(spec, systemd=self._systemd)
        self._once("systemd-analyze", msgspec.json.encode(units), lambda: sandbox_units.verify_units(units))

    def _envoy(self, digest: str, directory: Path) -> None:
        final = ring1.static_config(self._settings, digest, self._config.generations / digest)
        self._once(self._config.envoy, final, lambda: self._envoy_validates(digest, directory))

    def _envoy_validates(self, digest: str, directory: Path) -> None:
        candidate = directory / "static.json"
        candidate.write_bytes(ring1.static_config(self._settings, digest, directory))
        command: Sequence[str | Path] = [
            *(self._config.envoy, "--mode", "validate", "-c", candidate, "-l", "error", "--disable-hot-restart")
        ]
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=self._config.validate_s)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CandidateRefused(f"Envoy could not check the configuration: {error}") from error
        finally:
            candidate.unlink(missing_ok=True)
        if done.returncode != 0:
            text = done.stderr.decode("utf-8", "replace").strip()[-_WORDS:]
            raise CandidateRefused(f"Envoy refused the configuration: {text}")

    def _once(self, checker: str, subject: bytes, check: Callable[[], None]) -> None:
        """Run ``check``, unless this very program accepted the identical ``subject`` before."""
        found = Path(shutil.which(checker) or checker)
        state = found.stat() if found.exists() else None
        program = repr((checker, (state.st_size, state.st_mtime_ns) if state else None)).encode()
        mark = hashlib.sha256(subject + program).hexdigest()
        known = self._config.state / "validated"
        marks = known.read_text().split() if known.exists() else []
        if mark in marks:
            return
        check()
        write_atomic(known, "\n".join([*marks[1 - _REMEMBERED :], mark]) + "\n")
