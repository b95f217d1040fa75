"""The soak with mixed traffic in a small size, and that it tells what was lost and what grew."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOAK = Path(__file__).parents[2] / "soak"
sys.path[:0] = [str(SOAK), str(SOAK.parent / "integration")]


@pytest.mark.thorough
@pytest.mark.control("AUD-01")
@pytest.mark.control("RUN-01")
def test_mixed_traffic_is_recorded_call_by_call_and_a_signal_ends_it_with_its_verdict(tmp_path: Path) -> None:
    from ring2_rig import wait_for

    from saw.runtime.landlock import abi

    if abi() < 6:
        pytest.skip("this kernel's Landlock is older than ABI 6 (or switched off)")
    progress = tmp_path / "progress.jsonl"
    words = [sys.executable, str(SOAK / "mixed_traffic.py"), "--minutes", "60", "--workers", "1", "--json"]

    def each_was_seen() -> bool:
        assert soak.poll() is None, soak.communicate()[1]
        last = lines(progress)[-1:]
        done = last[0]["clients"].get("done", {}) if last else {}
        return bool(done) and all([*done.values(), last[0]["clones"], last[0]["neighbour"]])

    with subprocess.Popen(
        [*words, "--progress", str(progress)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as soak:
        try:
            wait_for(each_was_seen, "a call of each kind", 400)
            soak.send_signal(signal.SIGTERM)
            out, words_of_it = soak.communicate(timeout=400)
        finally:
            soak.terminate()
    assert soak.returncode == 0, words_of_it
    found = json.loads(out)
    assert (found["told_to_end"], all(found["each"].values()), found["clones"] > 0) == (True, True, True), found
    assert set(found["processes"]) == {"ring 1", "decider", "ring 2", "gatekeeper 1", "gatekeeper 2"}
    assert lines(progress)[-1] == {"verdict": "passed", "wrong": []}


def lines(progress: Path) -> list[dict[str, Any]]:
    """Return what the file of progress has so far; a line that is being written does not count."""
    if not progress.exists():
        return []
    return [
        json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
    ]


def row(host: str, path: str, verdict: str = "allow") -> dict[str, Any]:
    return {
        "http_request": {"url": {"hostname": host, "path": path}},
        "unmapped": {"saw": {"verdict": verdict}},
    }


DONE = {"read-0": 2, "model-0": 1, "refused-0": 1, "hidden-0": 1, "database-0": 1, "clone-0": 1}
PACK = "/team/demo.git/git-upload-pack"
ROWS = [
    row("api.example.com", "/v1/mixed/read-0-0"), row("api.example.com", "/v1/mixed/read-0-1"),
    row("inference.local", "/v1/chat/completions"), row("git.example.com", "/team/demo.git/info/refs"),
    row("git.example.com", PACK), row("git.example.com", PACK),
    row("db.example.com", "/"),
    {"api": {"operation": "postgres.connect"}, "status": "Success"},
    {"api": {"operation": "postgres.end"}, "status": "Success"},
]  # fmt: skip
ARRIVED = [
    ("GET", "api.example.com", "/v1/mixed/read-0-0"), ("GET", "api.example.com", "/v1/mixed/read-0-1"),
    ("POST", "models.example.com", "/v1/chat/completions"), ("GET", "git.example.com", "/team/demo.git/info/refs"),
    ("POST", "git.example.com", PACK), ("POST", "git.example.com", PACK),
]  # fmt: skip
REFUSED = [("api.example.com", "/v2/mixed/refused-0-0"), ("hidden.example.com", "")]
Change = Callable[[list[Any], list[Any], list[Any]], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "as it should be": (lambda *_: None, ""),
    "a row is lost": (lambda rows, *_: rows.pop(1), "rows of what is allowed: 1 differ"),
    "a row comes twice": (lambda rows, *_: rows.append(rows[0]), "rows of what is allowed: 1 differ"),
    "a model's row is lost": (lambda rows, *_: rows.pop(2), "rows of what is allowed: 1 differ"),
    "git's row is lost": (lambda rows, *_: rows.pop(3), "rows of what is allowed: 1 differ"),
    "a session has no end": (lambda rows, *_: rows.pop(), "steps of sessions: 1 differ"),
    "ring 2 refuses": (lambda rows, *_: rows.append(row("a", "/", "deny")), "rows of what is refused: 1 differ"),
    "a call is lost": (lambda _, arrived, __: arrived.pop(0), "arrived: 1 differ"),
    "a refused call arrives": (lambda _, arrived, __: arrived.append(("GET", *REFUSED[0])), "arrived: 1 differ"),
    "a refusal has no line": (lambda _, __, refused: refused.pop(), "refusals in ring 1's log: 1 differ"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_what_is_lost_or_too_much_is_told(tmp_path: Path, change: Change, words: str) -> None:
    rows, arrived, refused = ROWS[:], ARRIVED[:], REFUSED[:]
    change(rows, arrived, refused)
    wrong = compared(tmp_path, chained(rows), arrived, refused)
    assert [one.startswith(words) for one in wrong] == [True] * bool(words), wrong


def test_a_clone_of_which_a_call_neither_arrived_nor_has_a_row_is_told(tmp_path: Path) -> None:
    rows, arrived = [*ROWS[:3], *ROWS[4:]], [*ARRIVED[:3], *ARRIVED[4:]]
    wrong = compared(tmp_path, chained(rows), arrived, REFUSED)
    assert [one.partition(":")[0] for one in wrong] == ["arrived", "rows of what is allowed"], wrong


def test_a_chain_that_is_broken_between_two_looks_is_told(tmp_path: Path) -> None:
    rows = chained([*ROWS, row("api.example.com", "/v1/ready"), row("api.example.com", "/v1/ready")])
    assert compared(tmp_path, rows, ARRIVED, REFUSED) == []
    del rows[len(ROWS)]
    assert "the trail" in " ".join(compared(tmp_path, rows, ARRIVED, REFUSED))


def chained(rows: list[dict[str, Any]]) -> list[Any]:
    from saw.audit.chain import Head, link

    head, found = Head(), []
    for one in rows:
        found.append(link("edge", head, one))
        head = Head(found[-1].seq, found[-1].hash)
    return found


def compared(folder: Path, rows: list[Any], arrived: list[Any], refused: list[Any]) -> list[str]:
    """Return what is told of these, which come one by one."""
    from mixed_trail import Trail

    log = folder / "decide.log"
    told = [
        json.dumps({"verdict": "deny", "host": host, "path": path}, separators=(",", ":")) for host, path in refused
    ]
    log.write_text("".join(f"{line}\n" for line in told), encoding="utf-8")
    broker, far = SimpleNamespace(events=[]), SimpleNamespace(arrived=arrived[:])
    trail = Trail(broker, far)
    for one in rows:
        broker.events.append(one)
        trail.take()
    assert (len(broker.events), trail.total) == (1, len(rows))
    return trail.compared(DONE, log)


@pytest.mark.parametrize(
    ("late", "words"),
    [
        ((60_000, 40), []),
        ((120_000, 40), ["ring 1 grew from 50000 to 120000 KiB"]),
        ((50_000, 80), ["ring 1 had 40 descriptors and then 80"]),
    ],
    ids=["steady", "memory", "descriptors"],
)
def test_what_grew_is_told(late: tuple[int, int], words: list[str]) -> None:
    from mixed_traffic import grown, growth

    samples = [{"ring 1": (10, 1)}] * 25 + [{"ring 1": (50_000, 40)}] * 50 + [{"ring 1": late}] * 25
    assert grown(growth(samples)) == words
