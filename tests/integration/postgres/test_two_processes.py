"""Two real brokers, each a process with its own ports and sockets, on one PostgreSQL and one state directory."""

from __future__ import annotations

import copy
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from broker_rig import Lab, cli_here, encode
from postgres_rig import Server, end, running_postgres
from test_replicas import held, wait_until

from saw.broker.client import BrokerContext, BrokerRefusal, Context, OperatorClient

pytestmark = pytest.mark.control("FLT-01")


def beside(lab: Lab, directory: Path, state: Path | None = None) -> Lab:
    """A second broker of the lab's database, with its files or, with ``state``, others."""
    found = copy.copy(lab)
    directory.chmod(0o755)
    (directory / "run").mkdir()
    found.directory, found.process, found.port = directory, None, 0
    found.config = msgspec.structs.replace(
        lab.config,
        operator_socket=str(directory / "run" / "operator.sock"),
        audit_socket=str(directory / "run" / "audit.sock"),
        state_dir=str(state or lab.config.state_dir),
    )
    found.config_file = directory / "broker.json"
    found.config_file.write_bytes(msgspec.json.encode(found.config))
    found.operator = OperatorClient(Context(BrokerContext(socket=found.config.operator_socket)))
    return found


@pytest.fixture(scope="module")
def postgres():
    """A server of their own, which one test takes away for a while."""
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def pair(postgres: Server):
    """Brokers A and B, with revision 1 of a policy published at A."""
    places = [Path(tempfile.mkdtemp(prefix="saw-broker-")) for _ in range(2)]
    one = Lab(places[0], postgresql=postgres.database())
    two = beside(one, places[1])
    try:
        one.start()
        two.start()
        one.digest, publication = one.officers.publication(1)  # type: ignore[attr-defined]
        one.operator.request("POST", "/v1/policy/publish", encode(publication))
        yield one, two
    finally:
        for lab in (one, two):
            lab.stop()
        for place in places:
            shutil.rmtree(place)


def test_what_is_published_and_registered_at_one_is_served_by_the_other(pair: tuple[Lab, Lab]) -> None:
    one, two = pair
    one.workspace("shared")
    assert two.operator.request("GET", "/v1/workspaces/shared")["state"] == "requested"
    with two.tls() as client:
        assert client.get("/tuf/metadata/timestamp.json").status_code == 200
        assert (
            client.get("/tuf/metadata/timestamp.json").content
            == (one.config.tuf_dir / "metadata" / "timestamp.json").read_bytes()
        )


@pytest.mark.control("LIF-02")
def test_a_kill_at_one_reaches_the_perimeter_that_waits_at_the_other(pair: tuple[Lab, Lab]) -> None:
    one, two = pair
    one.workspace("killed", to="attesting")
    with two.tls("perimeter", "edge-pair") as edge, ThreadPoolExecutor(1) as pool:
        before = edge.get("/v1/perimeter/state").json()
        waiting = pool.submit(edge.get, f"/v1/perimeter/state?after={before['seq']}&wait=30")
        one.operator.request("POST", "/v1/workspaces/killed/kill", {"reason": "test"})
        after = waiting.result(60).json()
    assert after["seq"] > before["seq"]
    [entry] = [item for item in after["workspaces"] if item["id"] == "killed"]
    assert (entry["state"], entry["lease_expires_at"], entry["svid_sha256"]) == ("quarantined", None, None)
    assert two.operator.request("GET", "/v1/workspaces/killed")["state"] == "quarantined"


def test_with_other_files_a_second_broker_does_not_start(pair: tuple[Lab, Lab]) -> None:
    one, _ = pair
    place = Path(tempfile.mkdtemp(prefix="saw-broker-"))
    try:
        shutil.copytree(one.config.state, place / "state")
        third = beside(one, place, place / "state")
        done = cli_here("broker", "serve", "--config", str(third.config_file))
    finally:
        shutil.rmtree(place)
    assert done.returncode == 1
    assert "does not share" in done.stderr
    assert "put state_dir on a file system that all brokers of the database mount" in done.stderr


def test_when_one_is_killed_the_other_goes_on_with_everything(pair: tuple[Lab, Lab], postgres: Server) -> None:
    one, two = pair
    assert held(postgres, one.config) == (2, 1)
    answered = []
    with one.operator.session() as client:
        for number in range(5):
            body = {"id": f"last-{number}", "sponsor": "ada@example.com", "blueprint": "coding", "ring": "stable"}
            client.request("POST", "/v1/workspaces", {**body, "image": "workspace"})
            answered.append(f"last-{number}")
    assert one.process is not None
    end(one.process)
    one.process = None
    wait_until(lambda: held(postgres, two.config) == (1, 1), "the other one does the upkeep")
    for name in answered:
        assert two.operator.request("GET", f"/v1/workspaces/{name}")["state"] == "requested"
    two.workspace("after")
    assert two.operator.request("GET", "/v1/audit/verify")["complete"]
    one.start()
    assert one.operator.request("GET", "/v1/workspaces/after")["state"] == "requested"
    assert held(postgres, one.config) == (2, 1)


def test_while_the_database_is_away_both_refuse_and_then_go_on(pair: tuple[Lab, Lab], postgres: Server) -> None:
    postgres.stop("immediate")
    for lab in pair:
        with pytest.raises(BrokerRefusal) as caught:
            lab.operator.request("GET", "/v1/workspaces")
        assert (caught.value.code, bool(caught.value.cure)) == ("database_unavailable", True)
        with lab.tls() as client:
            assert client.get("/tuf/metadata/timestamp.json").status_code == 200, "what is signed needs no database"
    postgres.start()
    wait_until(lambda: held(postgres, pair[0].config) == (2, 1), "both are back")
    pair[0].workspace("back")
    assert pair[1].operator.request("GET", "/v1/workspaces/back")["state"] == "requested"
