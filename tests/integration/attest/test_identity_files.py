"""The identity files: readable by one group, consistent at any moment, taken up by a running Envoy."""

from __future__ import annotations

import grp
import json
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

import httpx
import pytest

from saw.attest.messages import Lease, QuoteAnswer
from saw.identity.x509 import Authority, new_key_and_csr
from saw.runtime.attestd_svid import IdentityFiles

NOW = datetime.now(UTC)
DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority.create(tmp_path_factory.mktemp("ca") / "x509", "saw.example", NOW)


def answer(authority, ttl=120, now=NOW):
    key, csr = new_key_and_csr("ws-demo")
    svid = authority.issue_svid(csr, "ws-demo", DIGEST, NOW, ttl)
    lease = Lease(ttl_s=ttl, expires_at=now + timedelta(seconds=ttl))
    return QuoteAnswer(svid.decode(), authority.ca_pem.decode(), lease, DIGEST, "user-ca", "host-cert"), key


@pytest.mark.skipif(os.geteuid() != 0, reason="changes a group")
def test_only_root_and_the_group_read_the_key(authority, tmp_path):
    group = grp.getgrall()[1]
    files = IdentityFiles(tmp_path, group.gr_name)
    files.write(*answer(authority))
    for name in ("key.pem", "sds.json"):
        status = (files.svid / name).stat()
        assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (group.gr_gid, 0o640)
    status = files.svid.stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (group.gr_gid, 0o2750)


@pytest.mark.control("POL-05")
def test_what_an_earlier_run_left_is_used_only_while_it_lasts(authority, tmp_path):
    files = IdentityFiles(tmp_path, "saw-no-such-group")
    assert files.remaining(NOW) is None
    lease = files.write(*answer(authority))
    again = IdentityFiles(tmp_path, "saw-no-such-group")
    assert again.remaining(NOW + timedelta(seconds=20)) == (lease, 100.0)
    # A clock that was set back does not make a lease longer than it was given.
    assert again.remaining(NOW - timedelta(hours=1)) == (lease, 120.0)
    assert again.remaining(NOW + timedelta(seconds=120)) is None
    assert sorted(path.name for path in files.svid.iterdir()) == ["ca.pem", "sds.json"]
    assert json.loads((files.svid / "sds.json").read_bytes()) == {"resources": []}


def bootstrap(sds: Path) -> dict[str, object]:
    """A server whose certificate is the SVID: whoever connects sees which one Envoy holds."""
    source = {"path_config_source": {"path": str(sds), "watched_directory": {"path": str(sds.parent)}}}
    tls = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [
                {"name": "svid", "sds_config": {**source, "resource_api_version": "V3"}}
            ]
        },
    }
    echo = {"@type": "type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo"}
    return {
        "node": {"id": "test", "cluster": "test"},
        "static_resources": {
            "listeners": [
                {
                    "name": "svid",
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
                    "filter_chains": [
                        {
                            "filters": [{"name": "echo", "typed_config": echo}],
                            "transport_socket": {"name": "tls", "typed_config": tls},
                        }
                    ],
                }
            ]
        },
        "admin": {"address": {"pipe": {"path": str(sds.parent.parent / "admin.sock")}}},
    }


def poll(condition):
    pause, deadline = threading.Event(), monotonic() + 20
    while True:
        value = condition()
        if value:
            return value
        assert monotonic() < deadline
        pause.wait(0.05)


def presented(port: int) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
            context.wrap_socket(raw) as channel,
        ):
            return ssl.DER_cert_to_PEM_cert(channel.getpeercert(binary_form=True))
    except OSError:
        return None


def listening(admin: Path) -> int | None:
    """The port Envoy's listener got, from its administration socket; None until it is there."""
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(admin)), timeout=5) as client:
            body = client.get("http://envoy/listeners?format=json").content
        return json.loads(body)["listener_statuses"][0]["local_address"]["socket_address"]["port_value"]
    except (httpx.HTTPError, ValueError, LookupError):
        return None


def test_a_running_envoy_that_started_before_takes_up_each_new_svid(authority, tmp_path):
    files = IdentityFiles(tmp_path, "saw-no-such-group")
    config = tmp_path / "bootstrap.json"
    config.write_text(json.dumps(bootstrap(files.svid / "sds.json")))
    envoy = Path(sys.executable).with_name("envoy")
    process = subprocess.Popen(
        [str(envoy), "-c", str(config), "--disable-hot-restart", "--concurrency", "1", "-l", "error"]
    )
    try:
        port = poll(lambda: listening(tmp_path / "admin.sock"))
        assert presented(port) is None  # no identity before the first attestation
        first, key = answer(authority)
        files.write(first, key)
        poll(lambda: presented(port) == first.svid_pem)
        second, key = answer(authority)
        files.write(second, key)
        assert second.svid_pem != first.svid_pem
        poll(lambda: presented(port) == second.svid_pem)
    finally:
        process.terminate()
        process.wait(20)
