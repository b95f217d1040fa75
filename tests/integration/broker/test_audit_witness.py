"""A witness on another machine follows a running broker's tree over HTTPS; and what the broker serves of it, and what not."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from broker_rig import NAME, Lab, cli_here
from test_audit_trail import chained, ship

from databases import back_up, put_back
from saw.audit.note import PublicKey, open_checkpoint
from saw.broker.tree_files import read_served

pytestmark = pytest.mark.control("AUD-02")


class Far:
    """A witness's machine beside a control host whose unit signs the tree."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.tree = Path(str(lab.config.audit_tree))
        self.config = folder / "witness.json"
        (folder / "state").mkdir()

    def checkpoint(self, **change: str):
        """What the unit of the control host runs."""
        told = {"--tiles": str(self.tree), "--key": str(self.tree.parent / "log.key"), "--name": "trail.example.com"}
        words = [word for pair in {**told, **change}.items() for word in pair]
        done = cli_here("audit", "checkpoint", "--socket", self.lab.config.audit_socket, *words, "--json")
        return json.loads(done.stdout) | {"code": done.returncode}

    def configure(self, **change: object) -> None:
        shutil.copy(self.tree.parent / "log.key.pub", self.folder)
        told = {
            "log": f"https://127.0.0.1:{self.lab.port}/audit-tree", "server_name": NAME, "name": "witness.example.com",
            "ca_file": str(self.lab.ca_file), "key": str(self.folder / "log.key.pub"), "state_dir": str(self.folder / "state"),
        }  # fmt: skip
        self.config.write_text(json.dumps({**told, **change}))

    def run(self, step: str = "run", *more: str):
        done = cli_here("audit", "witness", step, "--config", str(self.config), "--json", *more)
        return done.returncode, json.loads(done.stdout)

    def feed(self, source: str, count: int) -> None:
        with self.lab.tls("perimeter", source) as edge:
            assert ship(edge, source, chained(source, count)).status_code == 200


@pytest.fixture
def far(tmp_path: Path):
    directory = Path(tempfile.mkdtemp(prefix="saw-tree-"))  # paths of sockets are short
    lab = Lab(directory, audit_tree=str(tmp_path / "audit-tree/tiles"))
    (tmp_path / "audit-tree").mkdir()
    try:
        lab.start()
        yield Far(lab, tmp_path)
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.mark.thorough
def test_a_witness_follows_the_tree_and_fails_for_a_fork_and_a_broker_that_is_away(far: Far) -> None:
    far.feed("edge-a", 300)
    first = far.checkpoint()
    assert (first["code"], first["origin"]) == (0, "trail.example.com")
    far.configure()
    code, found = far.run()
    assert (code, found["state"], found["size"]) == (0, "witnessing", first["size"])
    backup = far.folder / "backup.db"
    back_up(far.lab.config, backup)
    far.feed("edge-b", 40)
    second = far.checkpoint()
    assert far.run()[1]["size"] == second["size"] > first["size"]
    log, key = (
        PublicKey.parse(file.read_text()) for file in (far.folder / "log.key.pub", far.folder / "state/witness.key.pub")
    )
    signed = open_checkpoint((far.folder / "state/checkpoint").read_bytes(), log, (key,))
    assert (signed.checkpoint.size, list(signed.witnesses)) == (second["size"], ["witness.example.com"])
    assert far.run("status") == (0, far.run("status")[1] | {"ok": True, "state": "witnessing"})
    # an authority that the broker is not of, and a broker under another name, are not believed
    for wrong in ({"ca_file": None}, {"server_name": "other.example.com"}):
        far.configure(**wrong)
        assert far.run()[1]["state"] == "lagging"
        assert "certificate" in far.run("status")[1]["error"]["message"].lower()
    far.configure()
    assert far.run()[1]["state"] == "witnessing"
    # the broker is put back, and its tree made anew of other events, under the same key
    far.lab.stop()
    put_back(far.lab.config, backup)
    far.lab.start()
    far.configure()
    far.feed("edge-c", 100)
    assert far.checkpoint()["code"] == 1, "the tree that is there is not continued"
    far.tree.rename(far.folder / "kept")
    assert far.checkpoint()["code"] == 0
    code, refused = far.run()
    assert (code, refused["error"]["code"]) == (1, "tree_forked")
    assert far.run()[1]["error"]["code"] == "alarm_stands"
    code, status = far.run("status")
    assert (code, status["state"], status["alarm"]["code"], status["size"]) == (
        1,
        "alarm",
        "tree_forked",
        second["size"],
    )
    [finding] = [json.loads(line) for line in (far.folder / "state/findings.jsonl").read_text().splitlines()]
    assert (finding["class_uid"], finding["finding_info"]["types"]) == (2004, ["tree_forked"])
    # the tree that was witnessed comes back: it goes on once somebody has looked
    shutil.rmtree(far.tree)
    (far.folder / "kept").rename(far.tree)
    assert far.run()[0] == 1
    assert far.run("clear", "--reason", "the restored tree was withdrawn")[0] == 0
    code, found = far.run()
    assert (code, found["state"], found["size"]) == (0, "witnessing", second["size"])


def test_a_key_is_made_once_and_never_beside_a_tree(far: Far) -> None:
    made = far.checkpoint()
    key = far.tree.parent / "log.key"
    text = key.read_text()
    assert key.stat().st_mode & 0o777 == 0o600
    assert far.checkpoint()["size"] == made["size"]
    assert key.read_text() == text
    assert far.checkpoint(**{"--name": "other.example.com"})["code"] == 1
    key.unlink()
    refused = far.checkpoint()
    assert (refused["code"], refused["error"]["code"]) == (1, "config_invalid")
    assert not key.exists()


def test_checkpoint_and_hashes_are_served_and_nothing_else_of_the_folder(far: Far, tmp_path: Path) -> None:
    far.feed("edge-served", 300)
    far.checkpoint()
    (far.tree / "secret").write_text("not for all")
    (far.tree.parent / "secret").write_text("not for all")
    (far.tree / "tile/0/777").symlink_to(far.tree.parent / "secret")
    (far.tree / "tile/7").symlink_to(far.tree / "tile/0")
    os.mkfifo(far.tree / "tile/0/778")
    with far.lab.tls() as anyone:
        answers = {
            path: anyone.get(f"/audit-tree/{path}")
            for path in (
                "checkpoint", "tile/0/000", "tile/entries/000", "secret", "tile/0/777", "tile/0/778", "tile/7/000", "tile/0", "",
                "tile/0/999", "..%2f..%2fsecret", "tile/0/../../secret", "%2e%2e/secret", "tile/0/000%00",
            )
        }  # fmt: skip
        assert anyone.post("/audit-tree/checkpoint").status_code in {404, 405}
    good = {path for path, answer in answers.items() if answer.status_code == 200}
    assert good == {"checkpoint", "tile/0/000"}
    assert {answer.status_code for answer in answers.values()} == {200, 404}
    assert answers["tile/0/000"].content == (far.tree / "tile/0/000").read_bytes()
    assert "no-cache" in answers["checkpoint"].headers["cache-control"]
    assert "immutable" in answers["tile/0/000"].headers["cache-control"]
    link = tmp_path / "link"
    link.symlink_to(far.tree)
    assert read_served(far.tree, "checkpoint") is not None
    assert read_served(far.tree, "checkpoint\n") is None
    assert read_served(link, "checkpoint") is None, "the folder itself is no link either"


def test_without_a_tree_there_is_no_route(own_broker: Lab) -> None:
    with own_broker.tls() as anyone:
        assert anyone.get("/audit-tree/checkpoint").status_code == 404
        assert anyone.get("/healthz").status_code == 200
