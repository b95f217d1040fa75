"""Ports of workspaces by a grant, through a real broker, bastion and workspace: what goes through, and what does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from session_rig import RULES, Bastion, make_key, running
from sign_in_rig import sign_in
from sso_rig import SsoLab, free_port, sso_lab, until

from saw.broker.clock import iso
from saw.broker.forwarding_settings import ForwardingSettings
from saw.identity.ssh import SshAuthority
from saw.mux import Frame, Kind, encode

pytestmark = pytest.mark.control("ID-02")
SECRET = "content-of-a-page-that-is-not-recorded"
SAW = [sys.executable, "-m", "saw.cli.main"]


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"{SECRET} {self.path}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    """The port of the server that the agent started."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[SsoLab, Bastion]]:
    """A broker that may grant ports, with a sign-in and a bastion; ``ws-a`` is ada's."""
    directory = Path(tempfile.mkdtemp(prefix="saw-ports-"))
    rules = ForwardingSettings(("1024-65535",), max_hours=2)
    with sso_lab(directory, sessions=RULES, forwarding=rules) as lab, running(lab, directory) as bastion:
        yield lab, bastion


@pytest.fixture
def ports(there: tuple[SsoLab, Bastion]) -> Iterator[Bastion]:
    """The bastion; what was granted is revoked afterwards."""
    yield there[1]
    for row in there[0].operator.request("GET", "/v1/forwards")["forwards"]:
        there[0].operator.request("POST", f"/v1/forwards/{row['id']}/revoke", {"reason": "the test is over"})


def grant(bastion: Bastion, port: int, to: str = "operator:root", *, length: str = "1h") -> str:
    done = bastion.saw(
        "session", "grant", "ws-a", "--port", str(port), "--to", to, "--for", length, "--reason", "look at it", "--json"
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["id"])


@contextmanager
def exposed(
    bastion: Bastion, port: int, environment: dict[str, str] | None = None, **context: object
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``saw expose`` while it runs; yields it, and what it said first (empty when it ended without)."""
    file = bastion.directory / f"context-{port}.json"
    told = {
        "broker": {"socket": bastion.lab.config.operator_socket, "ssh": None},
        "bastion": {"host": "127.0.0.1", "port": bastion.port, "user": "root", **context},
    }
    file.write_text(json.dumps(told))
    line = [*SAW, "expose", "ws-a", "--port", str(port), "--local", str(free_port()), "--context", str(file), "--json"]
    process = subprocess.Popen(
        line, env=environment or dict(os.environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        if process.poll() is None:
            process.kill()
            process.communicate()


def local_port(said: str) -> int:
    told = json.loads(said)
    assert told["ok"], told
    return int(str(told["url"]).rpartition(":")[2])


def fetch(port: int, path: str) -> str:
    client = HTTPConnection("127.0.0.1", port, timeout=60)
    client.request("GET", path)
    body = client.getresponse().read().decode()
    client.close()
    return body


def refusal(process: subprocess.Popen[str], said: str) -> str:
    """What ``saw expose`` was refused with."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, (said, errors)
    assert not said or not json.loads(said)["ok"], said
    return errors


def live(bastion: Bastion) -> list[str]:
    rows = bastion.lab.operator.request("GET", "/v1/sessions?live=1")["sessions"]
    return [row["id"] for row in rows if row["state"] == "open" and row["forward_port"]]


def test_a_page_is_seen_by_a_grant_and_the_recording_has_times_and_bytes_and_no_content(
    ports: Bastion, page: int
) -> None:
    given = grant(ports, page)
    with exposed(ports, page) as (process, said):
        local = local_port(said)
        assert [fetch(local, f"/{number}") for number in range(3)] == [f"{SECRET} /{number}" for number in range(3)]
        clients = [HTTPConnection("127.0.0.1", local, timeout=60) for _ in range(8)]
        for client in clients:
            client.request("GET", "/together")
        assert {client.getresponse().read().decode() for client in clients} == {f"{SECRET} /together"}
        for client in clients:
            client.close()
        [session] = live(ports)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    closed = ports.closed(session)
    assert (closed["forward_port"], closed["forward_grant"], closed["command"]) == (page, given, "")
    assert closed["reason"] in {"closed", "client_gone"}
    assert closed["bytes_out"] > 11 * len(SECRET)
    cast = ports.directory / "forward.cast"
    assert ports.saw("replay", session, "--output", str(cast)).returncode == 0
    header, *events = [json.loads(line) for line in cast.read_text().splitlines()]
    assert header["command"] == f"forward {page}"
    remarks = [event[2] for event in events if event[1] == "m"]
    assert f"forward port {page} connection 1 opened" in remarks
    assert sum("ended: " in remark for remark in remarks) == 11
    assert SECRET not in cast.read_text()
    assert SECRET.encode() not in ports.stored(session).read_bytes()
    trail = ports.lab.events()
    told = [
        event["event"]["unmapped"]["saw"]
        for event in trail
        if event["event"]["unmapped"]["saw"].get("forward") == given
    ]
    assert [one.get("forward_port", one.get("port")) for one in told] == [page] * 4, "granted, asked, opened, closed"


@pytest.mark.thorough
def test_the_person_to_whom_it_is_granted_sees_it_and_another_does_not(
    there: tuple[SsoLab, Bastion], ports: Bastion, page: int, tmp_path: Path
) -> None:
    ada = sign_in(there[0], tmp_path / "ada", "u-ada")
    given = grant(ports, page, "ada@example.com")
    with exposed(ports, page) as (process, said):
        assert f"port {page} of ws-a is not granted to operator:root" in refusal(process, said)
    with exposed(ports, page, ada, sign_in=True) as (_, said):
        assert fetch(local_port(said), "/ada") == f"{SECRET} /ada"
    there[0].operator.request("POST", f"/v1/forwards/{given}/revoke", {"reason": "done"})
    grant(ports, page)
    with exposed(ports, page, ada, sign_in=True) as (process, said):
        assert "is not granted to user:ada@example.com" in refusal(process, said)
    assert there[0].audited(class_uid=3002, status_detail="not_granted")


def test_without_a_grant_and_to_another_port_nothing_is_seen(ports: Bastion, page: int) -> None:
    with exposed(ports, page) as (process, said):
        assert "is not granted" in refusal(process, said)
    grant(ports, page)
    with exposed(ports, page + 1 if page < 65535 else page - 1) as (process, said):
        assert "is not granted" in refusal(process, said)
    with exposed(ports, 3128) as (process, said):
        assert "may not be forwarded" in refusal(process, said)
    with exposed(ports, page) as (_, said):
        assert fetch(local_port(said), "/") == f"{SECRET} /"


def test_where_nobody_listens_the_connection_is_cut_and_the_session_lives(ports: Bastion) -> None:
    port = free_port()
    grant(ports, port)
    with exposed(ports, port) as (process, said):
        local = local_port(said)
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", local), timeout=60) as client:
                assert client.recv(1) == b""
        assert process.poll() is None
        server = ThreadingHTTPServer(("127.0.0.1", port), Page)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert fetch(local, "/later") == f"{SECRET} /later"
        finally:
            server.shutdown()
            server.server_close()


def test_a_grant_that_is_over_opens_nothing(ports: Bastion, page: int) -> None:
    given = grant(ports, page)
    then = iso(datetime.now(UTC) - timedelta(seconds=1))
    ports.sql("UPDATE forward_grants SET expires_at = ? WHERE id = ?", then, given)
    with exposed(ports, page) as (process, said):
        assert "is not granted" in refusal(process, said)
    [row] = [
        one
        for one in json.loads(ports.saw("session", "grants", "--all", "--json").stdout)["forwards"]
        if one["id"] == given
    ]
    assert row["state"] == "expired"
    grant(ports, page)
    with exposed(ports, page) as (_, said):
        assert fetch(local_port(said), "/") == f"{SECRET} /"


@pytest.mark.control("ID-03")
@pytest.mark.parametrize("how", ["revoked", "ended", "stopped"])
def test_what_is_live_drops_with_its_reason(ports: Bastion, page: int, how: str) -> None:
    given = grant(ports, page)
    with exposed(ports, page) as (process, said):
        client = socket.create_connection(("127.0.0.1", local_port(said)), timeout=60)
        client.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(15) == b"HTTP/1.0 200 OK"
        [session] = live(ports)
        if how == "revoked":
            assert ports.saw("session", "revoke", given, "--reason", "enough").returncode == 0
        elif how == "ended":
            assert ports.saw("session", "end", session, "--reason", "enough").returncode == 0
        else:
            step = {"to": "stopped", "reason": "night"}
            ports.lab.operator.request("POST", "/v1/workspaces/ws-a/transition", step)
        _, errors = process.communicate(timeout=60)
        client.close()
        expected = {"revoked": "forward_revoked", "ended": "ended_by_operator", "stopped": "workspace_stopped"}[how]
        assert process.returncode == 1
        assert f"the session has ended: {expected}" in errors
        assert ports.closed(session)["reason"] == expected
    ports.sql("UPDATE workspaces SET state = 'active' WHERE id = ?", "ws-a")
    if how != "revoked":
        with exposed(ports, page) as (_, said):
            assert fetch(local_port(said), "/again") == f"{SECRET} /again"


def test_what_people_type_is_recorded_where_that_was_decided_and_what_their_browsers_send_is_not(
    ports: Bastion, page: int
) -> None:
    grant(ports, page)
    ports.configure(record_input=True)
    try:
        with exposed(ports, page) as (_, said):
            assert fetch(local_port(said), "/cookie-of-a-browser").endswith("/cookie-of-a-browser")
            [session] = live(ports)
    finally:
        ports.configure()
    ports.closed(session)
    cast = ports.directory / "input.cast"
    assert ports.saw("replay", session, "--output", str(cast)).returncode == 0
    assert {json.loads(line)[1] for line in cast.read_text().splitlines()[1:]} == {"m"}
    assert "cookie-of-a-browser" not in cast.read_text()


def test_without_its_recorder_nothing_goes_through(ports: Bastion, page: int) -> None:
    grant(ports, page)
    with exposed(ports, page) as (process, said):
        local = local_port(said)
        assert fetch(local, "/") == f"{SECRET} /"
        [recorder] = ports.recorders()
        os.kill(recorder, signal.SIGKILL)
        assert process.wait(60) == 1
        with pytest.raises(OSError):
            fetch(local, "/")
    ports.configure(recordings_dir="/dev/full")
    try:
        with exposed(ports, page) as (process, said):
            assert "cannot be recorded" in refusal(process, said)
    finally:
        ports.configure()
    with exposed(ports, page) as (_, said):
        assert fetch(local_port(said), "/again") == f"{SECRET} /again"


def test_a_session_for_a_port_does_nothing_else_and_others_reach_no_port(ports: Bastion, page: int) -> None:
    grant(ports, page)
    folder, session = ports.certify(forward_port=page)
    extension = subprocess.run(
        ["ssh-keygen", "-L", "-f", str(folder / "key-cert.pub")], check=True, capture_output=True, text=True
    ).stdout
    assert "permit-" not in extension
    refused = ports.ssh(folder, "echo in-the-workspace")
    assert (refused.returncode, refused.stdout) == (77, "")
    assert f"{session} runs no command" in refused.stderr
    assert ports.show(session)["state"] == "requested"
    folder, _ = ports.certify()
    done = ports.ssh(folder, str(page))
    assert SECRET not in done.stdout
    assert done.returncode == 127, "a command like any other, in the workspace"


def test_what_is_no_frame_ends_the_session(ports: Bastion, page: int) -> None:
    grant(ports, page)
    folder, session = ports.certify(forward_port=page)
    done = ports.ssh(folder, text="GET / HTTP/1.1\r\n\r\n")
    assert SECRET not in done.stdout
    assert ports.closed(session)["reason"] == "not_forwarding"
    folder, session = ports.certify(forward_port=page)
    client = subprocess.Popen(ports.line(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.read(8) == b"\0\0\0\0\0\0\1\1"
        client.stdin.write(encode(Frame(Kind.OPEN, 1)) + encode(Frame(Kind.DATA, 1, b"GET /raw HTTP/1.0\r\n\r\n")))
        client.stdin.flush()
        found = b""
        while b"/raw" not in found:
            found += os.read(client.stdout.fileno(), 65536)
        client.stdin.close()
        assert client.wait(60) == 0
        client.stdout.close()
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()
    assert ports.closed(session)["reason"] == "closed"


def test_no_way_of_ssh_forwards_a_port_with_a_grant_either(ports: Bastion, page: int) -> None:
    grant(ports, page)
    other = free_port()
    for extra in (("-R", f"{other}:127.0.0.1:{page}"), ("-W", f"127.0.0.1:{page}"), ("-w", "any:any")):
        folder, session = ports.certify(forward_port=page)
        done = ports.ssh(folder, extra=extra)
        assert done.returncode != 0, extra
        assert SECRET not in done.stdout
        assert ports.show(session)["state"] == "requested"
    for way, target in (("-L", f"{other}:127.0.0.1:{page}"), ("-D", str(other))):
        folder, session = ports.certify(forward_port=page)
        client = subprocess.Popen(
            ports.line(folder, extra=(way, target)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert client.stdin is not None
            assert client.stdout is not None
            assert client.stdout.read(8) == b"\0\0\0\0\0\0\1\1"
            with socket.create_connection(("127.0.0.1", other), timeout=60) as through:
                request = (
                    b"GET / HTTP/1.0\r\n\r\n" if way == "-L" else b"\5\1\0\5\1\0\1\x7f\0\0\1" + page.to_bytes(2, "big")
                )
                through.sendall(request)
                found = b""
                with contextlib.suppress(ConnectionError):
                    while piece := through.recv(4096):
                        found += piece
                assert SECRET.encode() not in found
            client.stdin.close()
            assert client.wait(60) == 0
            client.stdout.close()
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        until(lambda session=session: ports.show(session)["state"] == "closed", 60)


def test_a_certificate_of_the_second_leg_forwards_nothing_by_itself(ports: Bastion, page: int, tmp_path: Path) -> None:
    """The workspace's server of this rig would forward; a certificate of ours does not let it."""
    authority = SshAuthority.load(ports.lab.config.keys / "ssh")
    make_key(tmp_path / "key")
    public = (tmp_path / "key.pub").read_text()
    (tmp_path / "known_hosts").write_text(f"@cert-authority * {authority.host_ca}\n")
    # The first value of an option counts.
    line = ["ssh", "-o", "HostKeyAlias=ws-a", *ports.options(tmp_path), "-p", str(ports.base + 1)]
    for forward in (False, True):
        issued = authority.issue_user(public, "ws-a", "ses-1", datetime.now(UTC), forward=forward)
        (tmp_path / "key-cert.pub").write_text(issued + "\n")
        for extra in (("-W", f"127.0.0.1:{page}"), ("-R", f"{free_port()}:127.0.0.1:{page}")):
            done = subprocess.run(
                [*line, *extra, "root@127.0.0.1"], input="GET / HTTP/1.0\r\n\r\n", capture_output=True, text=True,
                timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode != 0, (forward, extra)
            assert SECRET not in done.stdout
        ran = subprocess.run(
            [*line, "root@127.0.0.1", "echo in-the-workspace"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert (ran.stdout == "in-the-workspace\n") is not forward
