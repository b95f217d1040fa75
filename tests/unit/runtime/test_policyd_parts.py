"""Floors, leaf certificates and the switch of generations, each by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12

from saw.errors import SawError
from saw.policy.model import Decision
from saw.runtime import generation, policyd_floor
from saw.runtime.decide import Answer, Decider, DecideService
from saw.runtime.decide_counts import Counted, Counts
from saw.runtime.leaf import LeafAuthority, publish_bundle, san_of
from saw.runtime.policyd_calls import CallReports
from saw.runtime.policyd_floor import FileFloor, FloorError, Floors, TpmFloor

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@pytest.fixture
def tcti():
    """A software TPM on a private socket."""
    with tempfile.TemporaryDirectory(prefix="saw-nv-") as directory:
        path = Path(directory) / "tpm"
        process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory}"),
                *("--flags", "not-need-init,startup-clear"),
                *("--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while not (path.exists() and Path(f"{path}.ctrl").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"swtpm:path={path}"
        process.terminate()
        process.wait(10)


@pytest.mark.control("POL-02")
def test_the_floor_in_the_tpm_survives_a_wiped_disk(tcti, tmp_path):
    file = tmp_path / "floor.json"

    def floors() -> Floors:
        return Floors([FileFloor(file), TpmFloor("0x01500010", tcti)])

    assert floors().get() == 1  # a counter's first value
    floors().raise_to(7)
    floors().raise_to(5)
    file.unlink()
    assert floors().get() == 7
    floors().raise_to(8)
    assert (FileFloor(file).get(), floors().get()) == (8, 8)


INDEX = "0x01500010"


def tpm(tcti: str, *command: str) -> bytes:
    """Act on the TPM as root of the workspace can."""
    environment = {**os.environ, "TPM2TOOLS_TCTI": tcti}
    return subprocess.run(command, check=True, capture_output=True, env=environment).stdout


@pytest.mark.control("POL-02")
@pytest.mark.parametrize("attack", ["undefine", "ordinary index", "other counter", "owner cleared"])
def test_root_cannot_lower_the_floor_in_the_tpm(tcti, attack):
    floor = TpmFloor(INDEX, tcti)
    floor.raise_to(6)
    if attack == "owner cleared":
        tpm(tcti, "tpm2_clear", "-c", "p")
    else:
        tpm(tcti, "tpm2_nvundefine", "-C", "o", INDEX)
    if attack == "ordinary index":
        tpm(tcti, "tpm2_nvdefine", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite|no_da", INDEX)
        low = subprocess.run(
            ["tpm2_nvwrite", "-C", "o", "-i", "-", INDEX],
            input=bytes(7) + b"\x02",
            check=True,
            capture_output=True,
            env={**os.environ, "TPM2TOOLS_TCTI": tcti},
        )
        assert low.returncode == 0
    if attack == "other counter":
        tpm(tcti, "tpm2_nvdefine", "-C", "o", "-a", "nt=counter|ownerread|ownerwrite", INDEX)
    # Root can only raise it, and so keep the workspace from older policies than it had: never bring one back.
    assert floor.get() == 6
    assert TpmFloor(INDEX, tcti).get() in {7, 8}
    floor.raise_to(9)
    assert (floor.get(), TpmFloor(INDEX, tcti).get()) == (9, 9)


@pytest.mark.control("POL-02")
def test_nobody_can_write_a_value_into_the_counter(tcti):
    floor = TpmFloor(INDEX, tcti)
    floor.raise_to(3)
    with pytest.raises(subprocess.CalledProcessError):
        tpm(tcti, "tpm2_nvwrite", "-C", "o", "-i", "/dev/zero", INDEX)
    tpm(tcti, "tpm2_nvincrement", "-C", "o", INDEX)  # its twin: what a counter is for
    assert TpmFloor(INDEX, tcti).get() == 4


@pytest.fixture
def ordinary(tcti):
    """The TPM with an index as earlier versions made it, at revision 5."""
    tpm(tcti, "tpm2_nvdefine", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite|no_da", INDEX)
    environment = {**os.environ, "TPM2TOOLS_TCTI": tcti}
    command = ["tpm2_nvwrite", "-C", "o", "-i", "-", INDEX]
    subprocess.run(command, input=bytes(7) + b"\x05", check=True, capture_output=True, env=environment)
    return tcti


class Interrupted(Exception):
    """The process ended here."""


@pytest.mark.control("POL-02")
@pytest.mark.parametrize("at", range(16))
def test_an_ordinary_index_becomes_a_counter_of_the_same_value_wherever_that_is_interrupted(ordinary, at):
    steps = 0

    class Failing(TpmFloor):
        def _run(self, command):
            nonlocal steps
            if steps == at:
                raise Interrupted
            steps += 1
            return super()._run(command)

    with contextlib.suppress(Interrupted):
        Failing(INDEX, ordinary).get()
    assert TpmFloor(INDEX, ordinary).get() in {5, 6}
    if at == 15:
        assert TpmFloor(INDEX, ordinary).get() == 5
    assert b"nt=0x1" in tpm(ordinary, "tpm2_nvreadpublic", INDEX)


def test_a_revision_far_above_the_counter_is_refused_and_one_within_its_step_is_not(tcti, monkeypatch):
    monkeypatch.setattr(policyd_floor, "MAX_STEP", 5)
    floor = TpmFloor(INDEX, tcti)
    with pytest.raises(FloorError, match="revision 9 is 8 above the TPM's counter, which moves at most 5 at once"):
        floor.raise_to(9)
    floor.raise_to(6)
    assert floor.get() == 6


def test_a_tpm_that_does_not_answer_is_an_error(tmp_path):
    with pytest.raises(FloorError):
        TpmFloor("0x01500010", f"swtpm:path={tmp_path / 'none'}").get()


def test_an_unreadable_floor_is_an_error_and_not_zero(tmp_path):
    path = tmp_path / "floor.json"
    path.write_text("{")
    with pytest.raises(FloorError, match="unreadable"):
        FileFloor(path).get()


@pytest.mark.parametrize(
    ("host", "san"),
    [
        ("A.example.com", "a.example.com"),
        ("*.example.com", "*.example.com"),
        ("**.example.com", "*.example.com"),
        ("10.0.0.1", None),
        ("", None),
        ("fd00::1", None),
    ],
)
def test_policy_hosts_become_names_of_the_leaf(host, san):
    assert san_of(host) == san


def test_an_authority_lasts_for_the_boot_and_knows_its_leaves(tmp_path):
    first, again = (LeafAuthority.ensure(tmp_path / "ca", NOW) for _ in range(2))
    other = LeafAuthority.ensure(tmp_path / "other", NOW)
    leaf, _ = first.issue(["a.example.com", "b.example.com"], NOW)
    names = x509.load_pem_x509_certificate(leaf).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example.com", "b.example.com"]
    assert first.ca_pem == again.ca_pem
    assert again.issued(leaf)
    assert not other.issued(leaf)
    assert not first.issued(b"no certificate")


def test_java_trusts_what_the_rest_of_the_sandbox_trusts(tmp_path):
    ours, system = (LeafAuthority.ensure(tmp_path / name, NOW) for name in ("ca", "system"))
    bundle, target, java = tmp_path / "system.pem", tmp_path / "trust/ca-bundle.pem", tmp_path / "trust/ca-bundle.p12"
    unreadable = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    bundle.write_bytes(system.ca_pem + unreadable + system.ca_pem)

    def trusted():
        content = pkcs12.load_pkcs12(java.read_bytes(), None)
        assert (content.key, content.cert) == (None, None)
        return {one.certificate.public_bytes(serialization.Encoding.PEM) for one in content.additional_certs}

    publish_bundle(bundle, ours, target)
    assert target.read_bytes().endswith(ours.ca_pem)
    assert trusted() == {ours.ca_pem, system.ca_pem}
    # Java takes a certificate as an authority only with this attribute of Oracle's on it (2.16.840.1.113894.746875.1.1).
    assert java.read_bytes().count(bytes.fromhex("6086480186f966adca7b0101")) == 2
    java.unlink()
    publish_bundle(bundle, ours, target)
    assert trusted() == {ours.ca_pem, system.ca_pem}
    bundle.write_bytes(b"")
    publish_bundle(bundle, ours, target)
    assert trusted() == {ours.ca_pem}


def test_ring_1s_authority_lies_alone_beside_the_bundle_and_follows_it(tmp_path):
    first, second = (LeafAuthority.ensure(tmp_path / name, NOW) for name in ("first", "second"))
    system, target, alone = tmp_path / "system.pem", tmp_path / "trust/ca-bundle.pem", tmp_path / "trust/ring1-ca.pem"
    system.write_bytes(b"the system's\n")
    for authority in (first, second):
        publish_bundle(system, authority, target)
        assert alone.read_bytes() == authority.ca_pem
    alone.unlink()
    publish_bundle(system, second, target)
    assert alone.read_bytes() == second.ca_pem


def test_a_placed_generation_is_exchanged_in_one_step(tmp_path):
    for content in ("one", "two"):
        directory = tmp_path / ".new"
        directory.mkdir()
        (directory / "file").write_text(content)
        generation.place(tmp_path, directory, "name")
        assert (tmp_path / "name" / "file").read_text() == content
        assert not directory.exists()
    generation.switch(tmp_path, "name")
    assert str((tmp_path / "current").readlink()) == generation.current(tmp_path) == "name"
    (tmp_path / ".compiling.x").mkdir()
    generation.prune(tmp_path, {"name"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "name", "switched"]


def denied(reason: str) -> Decision:
    return Decision(verdict="deny", reason=reason)


ALLOWED = Decision(verdict="allow")


class Telling:
    """The decision service's counts on a real socket, and what was told of them."""

    def __init__(self, directory: Path) -> None:
        self.counts = Counts(1.0)
        self.told: list[tuple[str, Counted, float]] = []
        self.fails = False
        self.clock = 0.0
        path = str(directory / "d.sock")
        self._server = uvicorn.Server(uvicorn.Config(self, uds=path, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.reports = CallReports(path, self._tell, lambda: self.clock, 10.0)

    def _tell(self, digest: str, counted: Counted, window: float) -> None:
        if self.fails:
            raise SawError("no way")
        self.told.append((digest, counted, window))

    async def __call__(self, scope, receive, send) -> None:
        service = DecideService(Decider(None, None, None, None, self.counts), lambda _: None)
        await service(scope, receive, send)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def telling(tmp_path):
    made = Telling(tmp_path)
    yield made
    made.stop()


def test_denied_calls_are_told_once_by_reason_and_not_too_often(telling):
    counts, reports = telling.counts, telling.reports
    counts.add("a", ALLOWED, tunnel=True)
    counts.add("a", ALLOWED, tunnel=False)
    counts.add("a", denied("host_not_allowed"), tunnel=True)
    counts.add("", denied("not_released"), tunnel=False)
    reports.report("a")
    assert telling.told == []  # too early
    telling.clock = 10.0
    reports.report("a")
    assert telling.told == [("a", Counted(1, {"host_not_allowed": 1}), 10.0)]
    counts.add("a", ALLOWED, tunnel=False)
    telling.clock = 20.0
    reports.report("a")
    assert len(telling.told) == 1  # nothing was denied
    counts.add("a", denied("deny_rule"), tunnel=False)
    telling.clock, telling.fails = 30.0, True
    with pytest.raises(SawError):
        reports.report("a")
    telling.fails = False
    reports.report("a")
    assert telling.told[1:] == [("a", Counted(0, {"deny_rule": 1}), 10.0)]


def test_counts_of_another_start_or_another_policy_are_not_mixed_up(telling):
    for _ in range(5):
        telling.counts.add("a", denied("deny_rule"), tunnel=False)
    telling.clock = 10.0
    telling.reports.report("a")
    telling.counts = Counts(2.0)
    telling.counts.add("a", denied("deny_rule"), tunnel=False)
    telling.counts.add("b", denied("host_not_allowed"), tunnel=False)
    telling.clock = 20.0
    telling.reports.report("a")
    telling.clock = 30.0
    telling.reports.report("b")
    assert [(digest, counted.denied) for digest, counted, _ in telling.told] == [
        ("a", {"deny_rule": 5}),
        ("a", {"deny_rule": 1}),
        ("b", {"host_not_allowed": 1}),
    ]
    for digest in "cde":
        telling.counts.add(digest, ALLOWED, tunnel=False)
    assert set(telling.counts.totals().policies) == {"d", "e"}


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize("full", [True, False])
def test_a_decision_that_cannot_be_written_down_is_a_refusal_that_says_so(full: bool) -> None:
    log = {"event": "ring1_decision", "verdict": "allow", "reason": "", "host": "api.example.com", "request_id": "r"}
    decider = SimpleNamespace(decide=lambda _: Answer(200, (("x-saw-ring1", "allow"),), b"", log))
    sent: list[dict[str, Any]] = []

    def write(_: object) -> None:
        if full:
            raise OSError(28, "No space left on device")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    service = DecideService(decider, write)  # type: ignore[arg-type]
    scope = {"type": "http", "path": "/decide", "method": "GET", "headers": []}
    asyncio.run(service(scope, receive, send))
    names = {name for name, _ in sent[0]["headers"]}
    assert (sent[0]["status"], b"x-saw-ring1" in names) == ((403, False) if full else (200, True))
    if full:
        body = json.loads(sent[1]["body"])
        assert (body["reason"], body["host"], body["request_id"]) == ("gatekeeper_stale", "api.example.com", "r")
        assert "cannot be written down" in body["detail"]
