"""A port or socket that is taken: the broker says who has it and what frees it, and leaves the other one alone."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from broker_rig import Lab

from saw.broker.config import Listen
from saw.broker.sso_settings import Listen as PagesListen
from saw.broker.sso_settings import ProviderSettings, SsoSettings


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A broker on a free port of its own, not started."""
    with tempfile.TemporaryDirectory(prefix="saw-broker-") as name, socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
        found.close()
        made = Lab(Path(name))
        made.config = msgspec.structs.replace(made.config, listen=Listen("127.0.0.1", port))
        made.config_file.write_bytes(msgspec.json.encode(made.config))
        yield made
        made.stop()


def broker(lab: Lab, verb: str) -> Any:
    """Run ``saw broker VERB`` to its end."""
    command = [sys.executable, "-m", "saw.cli.main", "broker", verb, "--config", str(lab.config_file)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.thorough
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_named_with_its_holder_and_cure(lab: Lab, address: str) -> None:
    port = lab.config.listen.port
    with socket.create_server((address, port)):
        refused = broker(lab, "serve")
    assert refused.returncode == 1
    comm = Path("/proc/self/comm").read_text().strip()
    words = f"the broker cannot listen on 127.0.0.1:{port}: {comm} (process {os.getpid()}) listens there"
    assert words in refused.stderr
    assert f"`ss -ltnp sport = :{port}`" in refused.stderr
    assert "broker_listen_port" in refused.stderr
    lab.start()
    assert lab.port == port


def test_an_address_of_another_host_is_told_apart_from_a_taken_port(lab: Lab) -> None:
    lab.config_file.write_bytes(
        msgspec.json.encode(msgspec.structs.replace(lab.config, listen=Listen("192.0.2.1", 8443)))
    )
    refused = broker(lab, "serve")
    assert refused.returncode == 1
    assert "cannot listen on 192.0.2.1:8443: Cannot assign requested address" in re.sub(
        r"\[Errno \d+\] ", "", refused.stderr
    )
    assert "an address of this host" in refused.stderr


def test_a_second_broker_leaves_the_first_ones_operator_socket_alone(lab: Lab) -> None:
    lab.start()
    assert lab.process is not None
    lab.config_file.write_bytes(msgspec.json.encode(msgspec.structs.replace(lab.config, listen=Listen("127.0.0.1", 0))))
    refused = broker(lab, "serve")
    assert refused.returncode == 1
    assert f"the broker cannot listen on {lab.config.operator_socket}: " in refused.stderr
    assert f"(process {lab.process.pid}) listens there" in refused.stderr
    assert lab.operator.request("GET", "/v1/workspaces") == {"workspaces": [], "next": None, "seq": 0}
    lab.process.kill()
    lab.process.wait(15)
    assert Path(lab.config.operator_socket).is_socket(), "the dead one's socket"
    lab.start()
    assert lab.operator.request("GET", "/v1/workspaces") == {"workspaces": [], "next": None, "seq": 0}


def test_the_preflight_tells_a_stranger_from_the_broker_itself(lab: Lab) -> None:
    lab.start()
    own = broker(lab, "ports")
    assert own.returncode == 0, own.stderr
    os.chown(lab.config.state, 65534, -1)
    stranger = broker(lab, "ports")
    os.chown(lab.config.state, 0, -1)
    assert stranger.returncode == 1
    assert lab.process is not None
    assert f"(process {lab.process.pid}) listens there" in stranger.stderr


def test_the_port_of_the_pages_is_looked_at_too_and_they_are_served_without_their_provider() -> None:
    with tempfile.TemporaryDirectory(prefix="saw-broker-") as name, socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        sso = SsoSettings(
            origin=f"https://localhost:{port}", listen=PagesListen("127.0.0.1", port), roles={"user": ("staff",)},
            provider=ProviderSettings(issuer="https://localhost:1", client_id="saw"),
        )  # fmt: skip
        lab = Lab(Path(name), sso=sso)
        os.chown(lab.config.state, 65534, -1)
        ports = broker(lab, "ports")
        os.chown(lab.config.state, 0, -1)
        for refused in (ports, broker(lab, "serve")):
            assert refused.returncode == 1
            assert f"the broker's pages cannot listen on 127.0.0.1:{port}" in refused.stderr
            assert "broker_sso.listen" in refused.stderr
        holder.close()
        lab.start()
        try:
            context = ssl.create_default_context(cafile=str(lab.ca_file))
            with httpx.Client(verify=context, base_url=sso.origin, trust_env=False, timeout=30) as client:
                assert client.get("/sign-in").status_code == 200
                away = client.get("/login")
                assert (away.status_code, "provider_unavailable" in away.text) == (503, True)
        finally:
            lab.stop()
