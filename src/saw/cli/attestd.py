"""``saw attestd``: run the attestation agent, or ask it for its state."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path

from saw import jsontext
from saw.errors import UnavailableError
from saw.files import load_json
from saw.runtime.attestd import serve
from saw.runtime.attestd_config import AttestdConfig

DEFAULT_CONFIG = Path("/etc/saw/attestd.json")


def main(argv: list[str]) -> int:
    """Run ``saw attestd [serve|status] [--config FILE]``; ``status`` prints JSON and exits 1 while not attested."""
    parser = argparse.ArgumentParser(prog="saw attestd", description="attestation agent of a workspace")
    parser.add_argument("action", nargs="?", choices=("serve", "status"), default="serve")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help=f"configuration (default {DEFAULT_CONFIG})")
    parser.add_argument("--json", action="store_true", help="report errors as JSON")
    arguments = parser.parse_args(argv)
    config = load_json(arguments.config, AttestdConfig)
    if arguments.action == "serve":
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        serve(config)
        return 0
    answer = ask_status(config.socket)
    print(answer.decode().strip())
    return 0 if jsontext.decode(answer).get("ok") else 1


def ask_status(path: Path) -> bytes:
    """Return the agent's answer to ``status``, one JSON line; raise :class:`UnavailableError` when it does not serve."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.settimeout(10)
            channel.connect(str(path))
            channel.sendall(b'{"op":"status"}\n')
            with channel.makefile("rb") as stream:
                line = stream.readline(1 << 20)
    except OSError as error:
        raise UnavailableError(
            f"the attestation agent does not answer on {path}: {error.strerror}", cure="check saw-attestd.service"
        ) from error
    if not line.endswith(b"\n"):
        raise UnavailableError(f"the attestation agent closed {path}", cure="check saw-attestd.service")
    return line
