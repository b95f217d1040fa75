"""The files that ring 2's Envoy watches: written atomically, in an order that never leaves a listener without cluster."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from saw.files import write_atomic
from saw.gateway import envoy_config, envoy_listeners
from saw.gateway.config import GatekeeperConfig, split_address
from saw.gateway.envoy_parts import DRAIN_SECONDS
from saw.gateway.errors import EnvoyRefused
from saw.gateway.streams import Standing


def _versioned(render: Callable[[str], str]) -> str:
    return render(hashlib.sha256(render("").encode()).hexdigest()[:16])


class XdsWriter:
    """Renders and writes the dynamic files of one perimeter; a file that would not change is left alone."""

    def __init__(self, config: GatekeeperConfig) -> None:
        self._config = config
        self._directory = config.ring2.xds_dir
        self._known: dict[object, str] = {}

    def render(
        self, numbers: Iterable[int], credential_headers: Iterable[str], streams: Mapping[int, Standing] | None = None
    ) -> dict[str, str]:
        """Return the content of the two ``sds-*.json``, of ``cds.json`` and ``lds.json`` for these workspace numbers, as far
        as this perimeter serves them.

        ``streams``: which of them may open WebSockets or gRPC calls (:func:`saw.gateway.envoy_listeners.listeners`).
        """
        ring2, names = self._config.ring2, sorted(set(credential_headers))
        seats = sorted({number for number in numbers if number in self._config.numbers})
        broker = split_address(ring2.broker_address, "ring2.broker_address")
        return {
            "sds-server.json": _versioned(lambda version: envoy_config.server_secret(version, ring2.tls_dir)),
            "sds-workspaces.json": _versioned(lambda version: envoy_config.workspace_authority(version, ring2.tls_dir)),
            "cds.json": _versioned(
                lambda version: envoy_config.clusters(
                    version,
                    replicas=self._config.all_sockets(),
                    broker=broker,
                    upstream_ca=ring2.upstream_ca_file,
                    numbers=seats,
                )
            ),
            "lds.json": _versioned(
                lambda version: envoy_listeners.listeners(
                    version,
                    numbers=seats,
                    credential_headers=names,
                    xds_dir=ring2.xds_dir,
                    ingress_of=ring2.ingress_of,
                    send_sockets=[item.send for item in self._config.all_sockets()],
                    reviews=self._config.review_socket is not None,
                    streams=streams,
                    known=self._known,
                )
            ),
        }

    def write(
        self, numbers: Iterable[int], credential_headers: Iterable[str], streams: Mapping[int, Standing] | None = None
    ) -> list[str]:
        """Write what changed and return the names of the files written; raises ``OSError``.

        Listeners that go away go first: cutting a workspace off never waits for another file.
        """
        wanted = self.render(numbers, credential_headers, streams)
        order = list(wanted)
        if len(wanted["lds.json"]) < self._size("lds.json"):
            order.reverse()
        return [name for name in order if self._replace(name, wanted[name])]

    def write_bootstrap(self) -> bool:
        """Write ``bootstrap.json`` and return whether it changed; raises ``OSError``."""
        return self._replace("bootstrap.json", envoy_config.bootstrap(self._directory))

    def _size(self, name: str) -> int:
        try:
            return (self._directory / name).stat().st_size
        except OSError:
            return 0

    def _replace(self, name: str, text: str) -> bool:
        path = self._directory / name
        if path.exists() and path.read_text("utf-8") == text:
            return False
        try:
            write_atomic(path, text, mode=0o644)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT} or len(text.encode()) > self._size(name):
                raise
            _rewrite(path, text.encode())
        return True


def _rewrite(path: Path, raw: bytes) -> None:
    """Replace a file by one that is no longer in the room that it has, so that a full disk stops no cut-off.

    Meanwhile it has another name: a crash leaves no file, which Envoy takes for no listeners, and never half of one.
    """
    aside = path.with_name(f".{path.name}.full")
    os.replace(path, aside)
    with aside.open("r+b") as stream:
        stream.write(raw)
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, path)  # what Envoy watches for


def envoy_arguments(config: GatekeeperConfig) -> list[str]:
    """Return the command line of ring 2's Envoy; short drain times end the connections of a removed listener."""
    return [
        str(config.ring2.envoy),
        "-c",
        str(config.ring2.xds_dir / "bootstrap.json"),
        "--drain-time-s",
        str(DRAIN_SECONDS),
        "--drain-strategy",
        "immediate",
        "--disable-hot-restart",
    ]


def validate(config: GatekeeperConfig, files: dict[str, str]) -> None:
    """Have Envoy check rendered files in ``--mode validate``; raise :class:`EnvoyRefused` with its own words.

    Envoy only checks static resources in that mode, so the files are put together into one static configuration.
    """
    static: dict[str, list[object]] = {}
    for name, text in files.items():
        key = "listeners" if name == "lds.json" else "clusters" if name == "cds.json" else "secrets"
        items = json.loads(text)["resources"]
        found = static.setdefault(key, [])
        found += [{field: value for field, value in item.items() if field != "@type"} for item in items]
    whole = {"node": {"id": "ring2-check", "cluster": "saw-perimeter"}, "static_resources": static}
    with tempfile.TemporaryDirectory(prefix="saw-ring2-") as directory:
        path = Path(directory) / "check.json"
        path.write_text(json.dumps(whole), "utf-8")
        command = [str(config.ring2.envoy), "--mode", "validate", "-l", "error", "-c", str(path)]
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    if result.returncode != 0:
        words = (result.stderr or result.stdout).strip()[-2000:]
        raise EnvoyRefused(f"Envoy refuses the configuration: {words}", cure="correct the named field")
