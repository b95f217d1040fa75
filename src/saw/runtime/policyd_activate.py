"""Activation: from a verified bundle to enforcement, in steps of which exactly one changes what is in force.

Everything before :func:`saw.runtime.generation.switch` can be abandoned, everything after it repeated; a process killed at
any point leaves the old generation or the new one.
"""

from __future__ import annotations

import hashlib
import http.client
import shutil
import socket
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.files import write_atomic
from saw.runtime import generation, ring1
from saw.runtime.generation import Content
from saw.runtime.leaf import LeafAuthority
from saw.runtime.policyd_config import PolicydConfig
from saw.runtime.policyd_dry_run import CandidateRefused, DryRun

_PAUSE = 0.02
Step = Callable[[str], None]


class ActivationRefused(SawError):
    """A verified policy could not be brought into force; ``reason`` is stable and machine-readable."""

    code = "activation_refused"

    def __init__(self, reason: str, message: str, *, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.reason = reason


class Activator:
    """Brings generations into force on this machine.

    ``now`` is the wall clock; ``step`` is told the name of each step before it runs.
    """

    def __init__(
        self,
        config: PolicydConfig,
        settings: ring1.Ring1,
        authority: LeafAuthority,
        now: Callable[[], datetime],
        *,
        group: int | None = None,
        step: Step = lambda _: None,
        dry_run: DryRun | None = None,
    ) -> None:
        self._config = config
        self._settings = settings
        self._authority = authority
        self._now = now
        self._group = group
        self._step = step
        self._root = config.generations
        self._expected: dict[str, str] | None = None
        self._active: Content | None = None
        self._proxy_answered = False
        self._dry_run = dry_run or DryRun(config, settings)

    @property
    def active(self) -> Content | None:
        """What is in force and was verified by this process."""
        return self._active

    def activate(self, content: Content) -> None:
        """Bring ``content`` into force and return once it is enforced; raises :class:`ActivationRefused`.

        On a refusal the generation from before is in force.
        """
        previous = generation.current(self._root)
        self._prepare(content)
        self._step("measure")
        self._measure(content)
        self._step("switch")
        generation.switch(self._root, content.digest)
        self._step("read back")
        try:
            self._read_back(content.digest)
        except ActivationRefused:
            if previous is not None:
                generation.switch(self._root, previous)
            if self._active is not None:
                self._measure(self._active)
            raise
        self._accept(content)

    def reassert(self) -> None:
        """Measure the policy in force again, after another one was measured and not switched to."""
        if self._active is not None:
            self._measure(self._active)

    def adopt(self, content: Content) -> bool:
        """Take over a generation that is in force already, restoring it when it is not intact; tell whether it was."""
        directory = self._root / content.digest
        intact = self._intact(directory, content)
        if not intact:
            self._prepare(content)
        self._measure(content)
        self._read_back(content.digest)
        self._accept(content)
        return intact

    def tampered(self) -> list[str]:
        """Return the names of files of the generation in force that changed since it was written."""
        if self._active is None or self._expected is None:
            return []
        if generation.current(self._root) != self._active.digest:
            return [generation.CURRENT]
        try:
            found = generation.fingerprint(self._root / self._active.digest)
        except OSError as error:
            return [str(error)]
        return sorted(
            name for name in found.keys() | self._expected.keys() if found.get(name) != self._expected.get(name)
        )

    def restore(self) -> None:
        """Write the generation in force again from the bundle that was verified."""
        if self._active is not None:
            self._prepare(self._active)
            generation.switch(self._root, self._active.digest)
            self._accept(self._active)

    def _accept(self, content: Content) -> None:
        self._active = content
        self._expected = generation.fingerprint(self._root / content.digest)
        generation.prune(self._root, {content.digest, generation.CLOSED})
        # A process killed while it switched leaves its link behind.
        for link in self._root.glob(f".{generation.CURRENT}.*"):
            link.unlink(missing_ok=True)

    def _intact(self, directory: Path, content: Content) -> bool:
        """Tell whether the generation on disk is the one that ``content`` compiles to, its leaf signed by our authority."""
        try:
            found = generation.fingerprint(directory)
            index = jsontext.decode((directory / generation.INDEX).read_bytes(), kind=generation.Index)
        except (OSError, msgspec.MsgspecError):
            return False
        wanted = {
            **{name: content.members[name] for name in ("policy.yaml", "governance.yaml")},
            "manifest.json": content.manifest,
            **generation.discovery_files(content.digest, directory, self._settings),
        }
        return (
            all(found.get(name) == hashlib.sha256(raw).hexdigest() for name, raw in wanted.items())
            and {**index.files, generation.INDEX: found[generation.INDEX]} == found
            and self._authority.issued((directory / "leaf.pem").read_bytes())
        )

    def _prepare(self, content: Content) -> None:
        self._step("compile")
        try:
            directory = generation.compile_generation(
                content, self._root, self._settings, self._authority, self._now(), group=self._group
            )
        except OSError as error:
            raise ActivationRefused("compile_failed", f"the generation cannot be written: {error}") from error
        try:
            self._step("validate")
            self._dry_run.check(content.digest, directory)
            self._step("place")
            generation.place(self._root, directory, content.digest)
        except CandidateRefused as refused:
            shutil.rmtree(directory, ignore_errors=True)
            raise ActivationRefused("validate_failed", refused.message) from refused
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _measure(self, content: Content) -> None:
        if self._config.attest_socket is None:
            return
        request = {"op": "measure", "policy_digest": content.digest, "revision": content.revision}
        answer: dict[str, Any] = {}
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.settimeout(self._config.measure_s)
                channel.connect(self._config.attest_socket)
                channel.sendall(msgspec.json.encode(request) + b"\n")
                line = channel.makefile("rb").readline(1 << 20)
            answer = jsontext.decode(line, kind=dict[str, Any])
        except (OSError, msgspec.MsgspecError) as error:
            raise ActivationRefused("measure_failed", f"the attestation agent did not answer: {error}") from error
        if answer.get("ok") is not True:
            raise ActivationRefused(
                "not_attested",
                f"the policy was measured but not attested: {msgspec.json.encode(answer).decode()[:500]}",
                cure="see the failures; the broker decides",
            )

    def _read_back(self, digest: str) -> None:
        """Wait until decision service and proxy both enforce ``digest``.

        Nothing is acknowledged that does not answer. A proxy that has not answered to this process yet may still be
        starting, and gets ``proxy_start_s`` for it; one that answered before must do so within ``readback_s``.
        """
        started = time.monotonic()
        decide, proxy = "", ""
        while time.monotonic() - started < self._patience(decide == digest):
            if decide != digest:
                decide = self._decided()
            if decide == digest:
                proxy = self._proxied()
                self._proxy_answered = self._proxy_answered or bool(proxy)
                if proxy == digest:
                    return
            time.sleep(_PAUSE)
        raise ActivationRefused(
            "read_back_failed",
            f"after the switch the decision service has {decide or 'nothing'} and the proxy {proxy or 'nothing'}",
            cure="see the journal of saw-decide and saw-ring1",
        )

    def _patience(self, decided: bool) -> float:
        waits_for_start = decided and not self._proxy_answered
        return max(self._config.readback_s, self._config.proxy_start_s if waits_for_start else 0.0)

    def _decided(self) -> str:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=self._config.decide_socket), timeout=5) as client:
                answer = client.get("http://decide/status").json()
        except (httpx.HTTPError, ValueError):
            return ""
        return str(answer.get("policy_digest", ""))

    def _proxied(self) -> str:
        """Return the generation that the proxy serves, empty when it does not answer."""
        connection = http.client.HTTPConnection(self._config.listen_address, self._config.listen_port, timeout=5)
        try:
            connection.request("GET", f"http://{ring1.PROBE_HOST}{ring1.PROBE_PATH}")
            return connection.getresponse().read(128).decode("ascii", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()


def ensure_secret_file(config: PolicydConfig) -> None:
    """Make sure that Envoy finds an SDS file: it refuses the whole cluster when there is none.

    When it was missing, ``current`` is renamed onto itself, which makes Envoy read its clusters again.
    """
    path = config.run / "svid" / "sds.json"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, b'{"resources": []}')
    name = generation.current(config.generations)
    if name is not None:
        generation.switch(config.generations, name)
