"""What a benchmark row says, and when a goal counts as met. How fast anything is belongs to the benchmarks, not here."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
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
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


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


def test_a_side_that_says_nothing_is_ended_and_one_that_speaks_is_heard(results):
    for script, line in (("echo did; exec sleep 600", "did\n"), ("exec sleep 600", "")):
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as side:
            assert results.line_of(side, 20 if line else 0.2) == line
            if line:
                side.kill()
            assert side.wait(20) == -signal.SIGKILL


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


def report(build, image_seconds, *, ok=True, workspace=None):
    """Write the report of a run whose image step took so long."""
    build.mkdir(parents=True, exist_ok=True)
    steps = [{"name": "golden image (Packer, Ansible)", "ok": True, "seconds": image_seconds}]
    told = {"ok": ok, "calls": [], "steps": steps, "workspace": workspace or {}}
    (build / "report.json").write_text(json.dumps(told))


NOW = datetime(2026, 1, 2, tzinfo=UTC)


def lab_rows(build, reference=None):
    image = build / "images" / "workspace-1"
    image.mkdir(parents=True, exist_ok=True)
    (image / "build.json").write_text(json.dumps({"name": "workspace-1", "seconds": 40.0, "created": "2026-01-01"}))
    if reference is not None:
        (image / "reference.json").write_text(json.dumps({"seconds": reference}))
    return {row.name: row for row in module("lab_figures").read(build)}


def test_what_the_lab_did_not_record_is_not_measured(results, tmp_path):
    module("workspace_runs")
    rows = module("lab_figures").read(tmp_path)
    assert [row.value for row in rows] == [None] * 5
    assert all(row.note.startswith("not measured: no") for row in rows)


@pytest.mark.parametrize(
    ("before", "image_seconds", "kind"),
    [
        ("nothing", 40.0, "cold"),
        ("everything", 0.9, "warm"),
        ("everything", 40.0, "other"),
        ("partial", 40.0, "other"),
        ("partial", 0.9, "other"),
    ],
)
def test_a_run_is_cold_or_warm_by_what_was_there_before_it(tmp_path, before, image_seconds, kind):
    report(tmp_path, image_seconds)
    assert module("workspace_runs").append(tmp_path, before, 100.0, 3, NOW).kind == kind


def test_cold_and_warm_runs_have_rows_of_their_own_with_their_goals(results, tmp_path):
    runs = module("workspace_runs")
    for before, image_seconds, seconds, ok in (
        ("nothing", 40.0, 800.0, True),
        ("everything", 0.9, 300.0, True),
        ("everything", 0.9, 90.0, True),
        ("everything", 0.9, 10.0, False),
        ("partial", 40.0, 70.0, True),
    ):
        report(tmp_path, image_seconds, ok=ok)
        runs.append(tmp_path, before, seconds, 0, NOW)
    rows = lab_rows(tmp_path)
    cold, warm = rows["make_workspace_cold"], rows["make_workspace_warm"]
    assert (cold.value, cold.goal, cold.met) == (800.0, "value at most 900", True)
    assert (warm.value, warm.goal, warm.met) == (90.0, "value at most 240", True)


def test_the_history_of_runs_stays_small_and_a_damaged_one_is_begun_anew(results, tmp_path):
    runs = module("workspace_runs")
    report(tmp_path, 0.9)
    (tmp_path / runs.FILE).write_text("{")
    for number in range(runs.KEPT + 2):
        runs.append(tmp_path, "everything", float(number), 0, NOW)
    assert [run.seconds for run in runs.history(tmp_path)] == [float(number) for number in range(2, runs.KEPT + 2)]


@pytest.mark.parametrize(("reference", "ratio"), [(None, None), (15.0, 2.0)])
def test_a_boot_is_compared_with_the_reference_boot_of_the_image(results, tmp_path, reference, ratio):
    report(tmp_path, 40.0, workspace={"attach": {"seconds": 3.5}, "boot_seconds": 30.0})
    rows = lab_rows(tmp_path, reference)
    assert (rows["boot_to_attested"].value, rows["boot_to_attested"].ratio) == (30.0, ratio)
    assert (rows["attach"].value, rows["image_build"].value) == (3.5, 40.0)


def test_a_workspace_that_ran_before_gives_no_boot_figure_and_says_what_to_run(results, tmp_path):
    report(tmp_path, 0.9, workspace={"boot_seconds": None})
    row = lab_rows(tmp_path, 15.0)["boot_to_attested"]
    assert (row.value, row.ratio) == (None, None)
    assert "make stop" in row.note


def test_a_failed_report_is_named(results, tmp_path):
    report(tmp_path, 40.0, ok=False, workspace={"attach": {"seconds": 3.5}})
    assert "NOT as expected" in lab_rows(tmp_path)["attach"].note


LAB_PARTS = {"converge": 2, "workspace-publish": 2, "workspace-kill": 2}


@pytest.mark.parametrize(("options", "words"), [([], "make workspace"), (["--no-lab"], "leaves the running lab alone")])
def test_without_a_lab_or_with_it_left_alone_the_rows_say_so(run, tmp_path, monkeypatch, options, words):
    monkeypatch.setenv("SAW_BUILD", str(tmp_path / "elsewhere"))
    parts = [word for name in LAB_PARTS for word in ("--only", name)]
    assert run.main([*parts, *options]) == 0
    rows = json.loads((tmp_path / "elsewhere/bench.json").read_text())
    assert [row["value"] for row in rows] == [None] * sum(LAB_PARTS.values())
    assert all(words in row["note"] for row in rows)


def test_a_running_lab_is_used_without_being_asked(run, results, tmp_path, monkeypatch):
    monkeypatch.setenv("SAW_BUILD", str(tmp_path))
    monkeypatch.setattr(module("lab_paths"), "running", lambda lab: lab.build == tmp_path)
    monkeypatch.setattr(module("lab_figures"), "converge", lambda _: [results.result("second_converge", 9.0, "s")])
    assert run.main(["--only", "converge"]) == 0
    assert [row["value"] for row in json.loads((tmp_path / "bench.json").read_text())] == [9.0]


def test_the_real_paths_say_what_they_are_compared_with_and_their_goal(results):
    paths = module("lab_paths")
    median, slowest = paths.rows(paths.KILL_ROWS, [(1.0, 0.5), (2.5, 0.6), (1.5, 0.5)], "3 kills")
    assert (median.value, median.baseline, median.ratio, median.goal) == (1.5, 0.5, 3.0, "")
    assert (slowest.value, slowest.goal, slowest.met) == (2.5, "value at most 2", False)


SAW_STUB = """#!/bin/sh
[ "$1 $2" = "lab up" ] || exit 2
mkdir -p build/lab build/images
cat report >build/report.json
exit "$(cat status)"
"""


@pytest.fixture
def checkout(tmp_path):
    """A tree in which ``make workspace`` runs with a bring-up that only writes the report that it is told to."""
    root = BENCHMARKS.parent
    for name in ("scripts/workspace.sh", "benchmarks/workspace_runs.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / "saw").write_text(SAW_STUB)
    (tmp_path / "scripts/bootstrap.sh").write_text(
        f"#!/bin/sh\nset -e; mkdir -p .venv/bin; cp saw .venv/bin/saw; chmod 755 .venv/bin/saw\n"
        f"printf '#!/bin/sh\\nexec {sys.executable} \"$@\"\\n' >.venv/bin/python; chmod 755 .venv/bin/python\n"
    )
    (tmp_path / "scripts/bootstrap.sh").chmod(0o755)
    return tmp_path


def bring_up(checkout, image_seconds, status):
    """Run the script; return its exit code and the kinds of the runs that are noted by now."""
    steps = [{"name": "golden image (Packer, Ansible)", "ok": True, "seconds": image_seconds}]
    (checkout / "report").write_text(json.dumps({"ok": status == 0, "steps": steps}, indent=2))
    (checkout / "status").write_text(str(status))
    done = subprocess.run(["bash", "scripts/workspace.sh"], cwd=checkout, capture_output=True, text=True, check=False)
    runs = checkout / "build/workspace-runs.json"
    return done.returncode, [(run["kind"], run["ok"]) for run in json.loads(runs.read_text())] if runs.exists() else []


def test_make_workspace_notes_whole_runs_and_keeps_their_exit_code(checkout):
    assert bring_up(checkout, 40.0, 0) == (0, [("cold", True)])
    assert bring_up(checkout, 0.5, 0) == (0, [("cold", True), ("warm", True)])
    code, runs = bring_up(checkout, 0.5, 1)
    assert (code, runs[-1]) == (1, ("warm", False))
    assert bring_up(checkout, 0.5, 0)[1][-1] == ("other", True)


def test_an_interrupted_run_is_not_noted(checkout):
    assert bring_up(checkout, 40.0, 130) == (130, [])


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_each_finds_what_it_imports(name):
    script = f"import runpy; runpy.run_path({str(BENCHMARKS / name)!r} + '.py', run_name='looked_at')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_of_site_tells_changes_and_how_often_it_asked_each_host():
    site = module("site_converge")
    tasks = [
        site.Task("one", "p", "perimeter", "Read", "ansible.builtin.slurp", 2.0, False, "", 4),
        site.Task("one", "p", "perimeter", "Look", "ansible.builtin.assert", 9.0, False, "", 3),
        site.Task("two", "p", "baseline", "Install", "secure_agent.workspace.component", 1.5, True, "/etc/x", 1),
        site.Task("localhost", "p", "", "Refuse", "ansible.builtin.command", 0.1, False),
    ]
    told = site.Run(12.345, tasks, 3.0).told()
    assert (told["seconds"], told["processor_seconds"]) == (12.35, 3.0)
    assert (told["changed"], told["changes"]) == (1, ["two: baseline: Install: /etc/x"])
    assert told["hosts"] == {
        "one": {"seconds": 11.0, "tasks": 2, "asked": 4, "changed": 0},
        "two": {"seconds": 1.5, "tasks": 1, "asked": 1, "changed": 1},
    }
    assert [one["task"] for one in told["slowest"]] == ["Look", "Read", "Install", "Refuse"]


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ({"changed": False}, 1),
        ({"results": [{"changed": True}, {"skipped": True}, {"changed": False}]}, 2),
        ({"results": [{"skipped": True}]}, 0),
        ({"results": "text"}, 1),
    ],
    ids=["no loop", "one skipped", "all skipped", "not of a loop"],
)
def test_an_item_that_was_skipped_is_no_question(answer, items):
    assert module("site_converge").items_of(answer) == items


def test_npm_keeps_what_has_an_integrity_by_its_hash(results):
    assert module("file_work").content_path("sha512-AQIDBA== sha1-x") == "sha512/01/02/0304"


@pytest.mark.parametrize("integrity", ["", " ", "sha512", "sha512-", "sha512-!", "../x-AQIDBA=="])
def test_what_is_no_integrity_is_no_place_in_the_cache(results, integrity):
    with pytest.raises(ValueError, match="is no integrity"):
        module("file_work").content_path(integrity)


class Counting:
    """A side that takes so many seconds, one less each time."""

    def __init__(self, seconds, order):
        self.seconds, self.order = seconds, order

    def timed(self, _):
        self.seconds -= 1.0
        self.order.append(self)
        return self.seconds, self.seconds / 2


@pytest.mark.parametrize(("rounds", "budget", "counted"), [(3, 60.0, 3), (3, 0.0, 1), (0, 60.0, 1)], ids=str)
def test_rounds_end_with_the_time_and_one_always_counts(results, rounds, budget, counted):
    order = []
    both = {"inside": Counting(20.0, order), "outside": Counting(10.0, order)}
    files = module("file_work")
    told = files.in_turns(both, files.WORK[0], rounds, budget)
    assert [seconds for seconds, _ in told["inside"]] == [18.0, 17.0, 16.0][:counted]
    assert len(told["outside"]) == counted
    first, second, third, fourth = order[:4]
    assert (first, second) == (fourth, third), "each side is first as often as the other"


def test_the_fastest_round_of_each_side_counts(results):
    files = module("file_work")
    row = files.row(files.WORK[0], {"inside": [(2.1, 1.0), (3.0, 0.9)], "outside": [(4.0, 0.5), (2.0, 0.6)]})
    assert (row.value, row.baseline, row.ratio, row.met) == (2100.0, 2000.0, 1.05, True)
    assert "processor time 1.800 x" in row.note


def test_each_path_is_compared_with_plain_hops_and_with_none(results):
    calls = module("governed_call")
    told = {
        "governed": calls.Told([4.0, 4.0, 8.0], [90.0, 100.0, 110.0], 10),
        "plain": calls.Told([2.0, 2.0, 2.0], [200.0], 10),
        "direct": calls.Told([1.0, 1.0, 1.0], [400.0], 10),
    }
    rows = {row.name: row for row in calls.rows("ring1", told, "two hops", calls.GOAL)}
    assert {name: row.ratio for name, row in rows.items()} == {
        "ring1_call_p50": 2.0, "ring1_call_p99": 4.0, "ring1_calls_per_second": 0.5,
        "ring1_call_p50_over_direct": 4.0, "ring1_call_p99_over_direct": 8.0, "ring1_calls_per_second_over_direct": 0.25,
    }  # fmt: skip
    assert {name for name, row in rows.items() if row.goal} == {"ring1_call_p50", "ring1_call_p99"}


def test_decisions_are_calls_over_the_processor_time_of_the_process_that_decides(results):
    calls = module("governed_call")
    told = {"governed": calls.Told([], [], 300), "plain": calls.Told([], [], 200)}
    ring1, ring2 = calls.decisions(told, {"decide": 0.5, "gatekeeper": 1.5, "plain": 0.0})
    assert (ring1.value, ring2.value) == (600.0, 200.0)
    assert ring1.baseline == round(200 / calls.TICK_S), "less than the kernel counts in is one of its ticks"


def test_processor_time_is_that_of_the_process(results):
    before = results.processor_time(os.getpid())
    while results.processor_time(os.getpid()) == before:
        hashlib.sha256(b"x" * 100_000).digest()
    with pytest.raises(OSError, match="No such file"):
        results.processor_time(2**22 + 1)


@pytest.mark.parametrize(("last", "status"), [(2.0, 0), (2.001, 1)])
def test_many_sessions_fail_when_the_last_is_dropped_too_late(monkeypatch, capsys, last, status):
    many = module("many_sessions")

    class Lab:
        def __init__(self, *_, **__):
            self.start = self.stop = lambda: None

    found = {"last_dropped_s": last, "dropped_in_time": many.in_time([0.1, last])}
    monkeypatch.setattr(many, "Lab", Lab)
    monkeypatch.setattr(many, "running", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(many, "sessions", lambda *_: found)
    assert many.main(["--json"]) == status
    shown = capsys.readouterr()
    assert json.loads(shown.out) == found, "the figures are told in any case"
    assert ("not within 2 s" in shown.err) is bool(status)
