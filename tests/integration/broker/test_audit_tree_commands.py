"""Completeness proved on another machine: a broker's tree, copies of tiles and trail, a witness; and what each refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import msgspec
import pytest
from broker_rig import cli, cli_here, running_broker
from test_audit_trail import chained, ship

from databases import back_up, beside, put_back
from saw.audit import Head, link

pytestmark = pytest.mark.control("AUD-02")


class Desk:
    """A control host's folder and, under ``away``, what another machine got of it."""

    def __init__(self, lab, folder) -> None:
        self.lab, self.folder = lab, folder
        self.away = folder / "away"
        self.away.mkdir()
        self.tiles = folder / "tiles"
        self.good("key", "--name", "trail.example.com", "--out", folder / "log.key")
        self.good("key", "--name", "witness.example.com", "--witness", "--out", folder / "witness.key")
        shutil.copy(folder / "log.key.pub", self.away)
        shutil.copy(folder / "witness.key.pub", self.away)

    def run(self, *arguments):
        """Run a command of ``saw audit``."""
        return cli_here("audit", *map(str, arguments), "--json")

    def good(self, *arguments):
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def bad(self, *arguments):
        """Return the codes of a refusal: its own, and its findings'."""
        done = self.run(*arguments)
        assert done.returncode == 1, done.stdout
        error = json.loads(done.stdout)["error"]
        return {error["code"], *(finding["code"] for finding in error["details"].get("findings", ()))}

    def feed(self, source, events) -> None:
        with self.lab.tls("perimeter", source) as edge:
            assert ship(edge, source, events).status_code == 200

    def checkpoint(self, *, key="log.key"):
        return self.good("checkpoint", "--tiles", self.tiles, "--key", self.folder / key)

    def carry(self, name="tiles"):
        """Copy the tiles, with their checkpoint, to the other machine."""
        place = self.away / name
        shutil.copytree(self.tiles, place)
        return place

    def export(self):
        copy = self.away / "trail.jsonl"
        copy.write_text(cli_here("audit", "export").stdout)
        return copy

    def verify(self, tiles, *more, checkpoint=None):
        place = checkpoint or tiles / "checkpoint"
        return ["verify", "--checkpoint", place, "--key", self.away / "log.key.pub", "--tiles", tiles, *more]


@pytest.fixture(scope="module")
def shared():
    with running_broker() as lab:
        yield lab


def at_desk(lab, folder, monkeypatch) -> Desk:
    context = lab.directory / "context.json"
    context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket, "ssh": None}}))
    monkeypatch.setenv("SAW_CONTEXT", str(context))
    return Desk(lab, folder)


@pytest.fixture
def desk(shared, tmp_path, monkeypatch):
    return at_desk(shared, tmp_path, monkeypatch)


@pytest.fixture
def own_desk(own_broker, tmp_path, monkeypatch):
    return at_desk(own_broker, tmp_path, monkeypatch)


def test_a_copy_is_proved_complete_on_another_machine_and_every_change_of_it_is_found(desk) -> None:
    desk.feed("edge-tree", chained("edge-tree", 300))
    made = desk.checkpoint()
    assert made["added"] == made["size"] > 300
    assert desk.checkpoint() == {**made, "added": 0}
    tiles, copy = desk.carry(), desk.export()
    desk.lab.stop()  # from here on there is no broker
    done = cli(desk.lab, "audit", *map(str, desk.verify(tiles, "--file", copy)), "--json")
    assert done.returncode == 0, done.stderr
    proved = json.loads(done.stdout)
    assert (proved["complete"], proved["size"], proved["events"], proved["newer"]) == (
        True,
        made["size"],
        made["size"],
        0,
    )
    lines = copy.read_text().splitlines(keepends=True)
    forged = json.loads(lines[-1])
    forged["seq"] = 290
    for changed, code in (
        (lines[:-1], "removed"),
        (lines[:10] + lines[11:], "removed"),
        ([line.replace("/299", "/298") for line in lines], "changed"),
        ([*lines, json.dumps(forged) + "\n"], "changed"),
    ):
        copy.write_text("".join(changed))
        assert code in desk.bad(*desk.verify(tiles, "--file", copy)), code
    copy.write_text("".join(reversed(lines)))
    assert desk.good(*desk.verify(tiles, "--file", copy))["events"] == made["size"]
    newest = json.loads(lines[-1])
    for prev, code in ((newest["hash"], 0), ("0" * 64, 1)):
        item = link("edge-tree", Head(newest["seq"], prev), newest["event"])
        copy.write_text("".join([*lines, msgspec.json.encode(item).decode() + "\n"]))
        found = desk.run(*desk.verify(tiles, "--file", copy))
        assert found.returncode == code
        assert ("does not fit into its chain" if code else '"newer": 1') in found.stdout
    part = desk.away / "part.jsonl"
    part.write_text("".join(lines[40:50]))
    assert "nothing to hold the tree against" in desk.run("verify", "--tiles", tiles, "--file", part).stdout
    assert desk.good(*desk.verify(tiles, "--file", part, "--part"))["events"] == 10
    assert "removed" in desk.bad(*desk.verify(tiles, "--file", part))
    desk.lab.start()


def test_tiles_and_checkpoints_that_are_not_the_signed_ones_are_refused(desk) -> None:
    desk.feed("edge-tiles", chained("edge-tiles", 280))
    desk.checkpoint()
    copy = desk.export()
    part = desk.away / "part.jsonl"
    part.write_text("".join(copy.read_text().splitlines(keepends=True)[100:103]))
    good = desk.carry("good")
    whole = desk.verify(good, "--file", part, "--part")
    assert desk.good(*whole)
    bundle = good / "tile/entries/000"
    raw = bundle.read_bytes()
    size = 2 + int.from_bytes(raw[:2], "big")
    second = size + 2 + int.from_bytes(raw[size : size + 2], "big")
    for changed, codes in (
        (raw[size:second] + raw[:size] + raw[second:], {"tree_changed"}),
        (raw.replace(b'"hash":"', b'"hash":"0', 1)[: len(raw)], {"tree_changed", "tree_invalid"}),
        (raw[: len(raw) // 2], {"tree_invalid"}),
    ):
        bundle.write_bytes(changed)
        assert desk.bad(*desk.verify(good)) & codes
    bundle.write_bytes(raw)
    assert desk.good(*desk.verify(good))
    hashes = {path: path.read_bytes() for path in (good / "tile/0").rglob("*") if path.is_file()}
    for path, kept in hashes.items():
        path.write_bytes(bytes(len(kept)))
    assert "tree_changed" in desk.bad(*whole), "a part is proved by the tiles of hashes"
    for path, kept in hashes.items():
        path.write_bytes(kept)
    assert desk.good(*whole)
    desk.good("key", "--name", "trail.example.com", "--out", desk.folder / "other.key")
    assert desk.bad("checkpoint", "--tiles", desk.tiles, "--key", desk.folder / "other.key") == {"note_invalid"}
    shutil.copy(desk.folder / "other.key.pub", desk.away / "log.key.pub")
    assert desk.bad(*desk.verify(good)) == {"note_invalid"}
    assert "exists" in desk.run("key", "--name", "x", "--out", desk.folder / "other.key").stdout


def test_a_witness_and_an_older_checkpoint_find_a_rolled_back_and_a_split_tree(own_desk) -> None:
    desk = own_desk
    desk.feed("edge-tree", chained("edge-tree", 20))
    desk.checkpoint()
    backup = desk.folder / "backup.db"
    back_up(desk.lab.config, backup)
    old = desk.carry("old")

    def witness(tiles, out="signed"):
        keys = ["--key", desk.away / "log.key.pub", "--witness-key", desk.folder / "witness.key"]
        files = ["--checkpoint", tiles / "checkpoint", "--tiles", tiles, "--state", desk.away / "witness.json"]
        return ["witness", *keys, *files, "--out", desk.away / out]

    assert desk.good(*witness(old))["size"] >= 20
    desk.feed("edge-more", chained("edge-more", 10))
    desk.checkpoint()
    new = desk.carry("new")
    asked = ["--witness", desk.away / "witness.key.pub"]
    assert "unwitnessed" in desk.bad(*desk.verify(new, *asked))
    desk.good(*witness(new))
    proved = desk.good(
        *desk.verify(new, *asked, "--since-checkpoint", old / "checkpoint", checkpoint=desk.away / "signed")
    )
    assert list(proved["witnesses"]) == ["witness.example.com"]
    assert desk.bad(*witness(old)) == {"tree_shrunk"}
    assert "tree_shrunk" in desk.bad(*desk.verify(old, "--since-checkpoint", new / "checkpoint"))
    # The broker is put back, and something else happens: the tree is not continued, and one made anew is another view.
    desk.lab.stop()
    put_back(desk.lab.config, backup)
    desk.lab.start()
    desk.feed("edge-else", chained("edge-else", 10))
    assert desk.bad("checkpoint", "--tiles", desk.tiles, "--key", desk.folder / "log.key") == {"tree_invalid"}
    shutil.rmtree(desk.tiles)
    assert desk.checkpoint()["size"] == proved["size"]
    split = desk.carry("split")
    assert desk.bad(*witness(split)) == {"split_view"}
    assert "split_view" in desk.bad(*desk.verify(split, "--since-checkpoint", new / "checkpoint"))
    desk.feed("edge-fork", chained("edge-fork", 3))
    desk.checkpoint()
    fork = desk.carry("fork")
    assert desk.bad(*witness(fork)) == {"tree_forked"}
    assert "tree_forked" in desk.bad(*desk.verify(fork, "--since-checkpoint", new / "checkpoint"))
    assert desk.good(*desk.verify(fork, "--since-checkpoint", split / "checkpoint"))


def test_a_checkpoint_that_is_killed_leaves_a_whole_tree_and_a_removed_row_ends_it(desk) -> None:
    desk.feed("edge-killed", chained("edge-killed", 600))
    first = desk.checkpoint()
    before = {path: path.read_bytes() for path in desk.tiles.rglob("*") if path.is_file()}
    desk.feed("edge-after", chained("edge-after", 600))
    context = str(desk.lab.directory / "context.json")
    command = [sys.executable, "-m", "saw.cli.main", "audit", "checkpoint", "--tiles", str(desk.tiles)]
    command += ["--key", str(desk.folder / "log.key"), "--context", context]
    process = subprocess.Popen(command)
    while not (desk.tiles / "tile/0/003").exists() and process.poll() is None:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if (desk.tiles / "checkpoint").read_bytes() == before[desk.tiles / "checkpoint"]:
        assert desk.good(*desk.verify(desk.tiles))["size"] == first["size"]
    second = desk.checkpoint()
    assert second["size"] >= first["size"] + 600
    proved = desk.good(*desk.verify(desk.tiles, "--file", desk.export()))
    assert proved["size"] == second["size"]
    desk.feed("edge-last", chained("edge-last", 5))
    with beside(desk.lab.config) as store:
        row = store.execute("SELECT * FROM audit_events WHERE source = 'edge-last' AND seq = 2").fetchone()
        store.execute("DELETE FROM audit_events WHERE source = 'edge-last' AND seq = 2")
    assert desk.bad("checkpoint", "--tiles", desk.tiles, "--key", desk.folder / "log.key") == {"tree_invalid"}
    assert desk.good(*desk.verify(desk.tiles))["size"] == second["size"]
    with beside(desk.lab.config) as store:
        store.execute("INSERT INTO audit_events VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    assert desk.checkpoint()["size"] > second["size"]
