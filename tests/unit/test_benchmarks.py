"""What a benchmark row says, and when a goal counts as met. How fast anything is belongs to the benchmarks, not here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIELDS = {"name", "value", "unit", "baseline", "ratio", "goal", "met", "command", "note"}


def module(name):
    """Load a file of ``benchmarks/``, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def results():
    return module("results")


@pytest.fixture
def run(results, monkeypatch):
    made = module("run")
    monkeypatch.setattr(made, "NEEDS_ROOT", frozenset())
    return made


@pytest.mark.parametrize(
    ("goal", "value", "baseline", "met"),
    [
        (("value", "least", 2000), 2000, None, True),
        (("value", "least", 2000), 1999.9, None, False),
        (("value", "most", 2), 2.0, None, True),
        (("value", "most", 2), 2.0001, None, False),
        (("ratio", "most", 1.3), 1.3, 1.0, True),
        (("ratio", "most", 1.3), 1.3004, 1.0, False),
        (("ratio", "most", 1.3), 1.0, None, False),
        (("ratio", "most", 1.3), 1.0, 0.0, False),
        (("difference", "most", 15), 16.0, 1.0, True),
        (("difference", "most", 15), 16.1, 1.0, False),
        (("difference", "most", 15), 16.0, None, False),
    ],
)
def test_a_goal_is_met_up_to_its_bound_and_never_without_what_it_compares(results, goal, value, baseline, met):
    assert results.result("x", value, "s", baseline=baseline, goal=results.Goal(*goal)).met is met


def test_the_ratio_is_value_over_baseline(results):
    assert results.result("x", 3.0, "ms", baseline=2.0).ratio == 1.5
    assert results.result("x", 3.0, "ms").ratio is None
    assert results.result("x", 3.0, "ms", baseline=0.0).ratio is None


def test_the_verdict_is_that_of_the_unrounded_figures(results):
    row = results.result("x", 2.00001, "s", goal=results.Goal("value", "most", 2.0))
    assert (row.value, row.met) == (2.0, False)


def test_what_was_not_measured_says_so_and_has_no_verdict(results):
    row = results.result("x", None, "s", baseline=1.0, goal=results.Goal("ratio", "most", 1.3))
    assert (row.value, row.ratio, row.met, row.note) == (None, None, None, "not measured")
    assert row.goal == "ratio at most 1.3"


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.0, 1)], ids=str)
def test_a_quantile_is_a_value_that_was_measured(results, share, expected):
    assert results.quantile(list(range(100, 0, -1)), share) == expected
    assert results.quantile([7.0], share) == 7.0


def test_the_file_is_a_list_of_rows_with_exactly_these_fields(results, tmp_path):
    path = tmp_path / "build" / "bench.json"
    results.write([results.result("x", 1.0, "s"), results.result("y", None, "s")], path)
    rows = json.loads(path.read_text())
    assert [row["name"] for row in rows] == ["x", "y"]
    assert all(set(row) == FIELDS for row in rows)


def test_the_table_marks_a_missed_goal_and_only_that(results):
    goal = results.Goal("value", "most", 2.0)
    text = results.table([results.result("good", 1.0, "s", goal=goal), results.result("bad", 3.0, "s", goal=goal)])
    assert [line[0] for line in text.splitlines()[2:]] == ["+", "!"]
    assert text.count("MISSED") == 1


def test_a_part_that_fails_is_a_row_and_the_others_still_run(run, results, tmp_path, monkeypatch, capsys):
    def broken(_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(run, "PARTS", {"bad": broken, "good": lambda _: [results.result("x", 1.0, "s")]})
    path = tmp_path / "bench.json"
    assert run.main(["--output", str(path)]) == 1
    bad, good = json.loads(path.read_text())
    assert (bad["value"], bad["note"]) == (None, "failed: RuntimeError: no such thing")
    assert (good["value"], good["command"]) == (1.0, "python benchmarks/run.py --only good")
    assert "FAILED" in capsys.readouterr().out


def test_a_missed_goal_does_not_fail_the_run(run, results, tmp_path, monkeypatch):
    slow = results.result("x", 9.0, "s", goal=results.Goal("value", "most", 2.0))
    monkeypatch.setattr(run, "PARTS", {"slow": lambda _: [slow]})
    assert run.main(["--output", str(tmp_path / "bench.json")]) == 0


def test_one_part_alone_replaces_its_own_rows_and_keeps_the_others(run, results, tmp_path, monkeypatch):
    figures = {"a": 1.0, "b": 2.0}
    parts = {name: lambda _, name=name: [results.result(name, figures[name], "s")] for name in figures}
    monkeypatch.setattr(run, "PARTS", parts)
    path = tmp_path / "bench.json"
    run.main(["--output", str(path)])
    figures |= {"a": 5.0, "b": 6.0}
    run.main(["--only", "a", "--output", str(path)])
    assert {row["name"]: row["value"] for row in json.loads(path.read_text())} == {"a": 5.0, "b": 2.0}


STEPS = [
    {"name": "golden image (Packer, Ansible)", "ok": True, "seconds": 40.0},
    {"name": "release record of the image", "ok": True, "seconds": 20.0},
    {"name": "workspace: create, boot, attest, activate", "ok": True, "seconds": 60.0},
]


def lab_rows(build, report=None, reference=None):
    image = build / "images" / "workspace-1"
    image.mkdir(parents=True, exist_ok=True)
    (image / "build.json").write_text(json.dumps({"name": "workspace-1", "seconds": 40.0, "created": "2026-01-01"}))
    if report is not None:
        (build / "report.json").write_text(json.dumps({"ok": True, "calls": [], **report}))
    if reference is not None:
        (image / "reference.json").write_text(json.dumps({"seconds": reference}))
    return {row.name: row for row in module("lab_figures").read(build)}


def test_what_the_lab_did_not_record_is_not_measured(results, tmp_path):
    rows = module("lab_figures").read(tmp_path)
    assert [row.value for row in rows] == [None] * 4
    assert all(row.note.startswith("not measured: no") for row in rows)


@pytest.mark.parametrize(("reference", "ratio"), [(None, None), (15.0, 2.0)])
def test_a_boot_is_compared_with_the_reference_boot_of_the_image(results, tmp_path, reference, ratio):
    workspace = {"attach": {"seconds": 3.5}, "boot_seconds": 30.0}
    rows = lab_rows(tmp_path, {"steps": STEPS, "workspace": workspace}, reference)
    assert (rows["boot_to_attested"].value, rows["boot_to_attested"].ratio) == (30.0, ratio)
    assert (rows["make_workspace"].value, rows["attach"].value, rows["image_build"].value) == (120.0, 3.5, 40.0)
    assert "built in this run" in rows["make_workspace"].note


def test_a_workspace_that_ran_before_gives_no_boot_figure(results, tmp_path):
    row = lab_rows(tmp_path, {"steps": STEPS, "workspace": {"boot_seconds": None}}, 15.0)["boot_to_attested"]
    assert (row.value, row.ratio) == (None, None)


def test_a_failed_step_gives_no_figure_and_a_failed_report_is_named(results, tmp_path):
    rows = lab_rows(tmp_path, {"ok": False, "steps": [*STEPS[:2], {**STEPS[2], "ok": False}]})
    assert rows["boot_to_attested"].value is None
    assert "NOT as expected" in rows["make_workspace"].note


def test_the_lab_is_touched_only_when_asked(results, tmp_path):
    (row,) = module("lab_figures").converge(tmp_path, run=False)
    assert (row.value, row.met) == (None, None)
    assert "--lab" in row.note
