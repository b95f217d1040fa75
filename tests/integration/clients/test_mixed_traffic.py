"""The soak with mixed traffic in a small size, and that it tells what grew."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "soak"
sys.path[:0] = [str(SOAK)]


@pytest.mark.control("AUD-01")
@pytest.mark.control("RUN-01")
def test_mixed_traffic_is_answered_and_its_reads_notes_and_refusals_are_recorded_once() -> None:
    from saw.runtime.landlock import abi

    if abi() < 6:
        pytest.skip("this kernel's Landlock is older than ABI 6 (or switched off)")
    words = [sys.executable, str(SOAK / "mixed_traffic.py"), "--minutes", "0.15", "--workers", "1", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as soak:
        try:
            out, words_of_it = soak.communicate(timeout=600)
        finally:
            soak.terminate()
    assert soak.returncode == 0, words_of_it
    found = json.loads(out)
    assert all(found["each"].values()), found["each"]
    assert (found["clones"] > 0, found["rows"] > 0, found["refusals"] > 0) == (True, True, True)
    assert set(found["processes"]) == {"ring 1", "decider", "ring 2", "gatekeeper"}


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
