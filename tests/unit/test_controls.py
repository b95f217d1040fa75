"""The control list, the marks and the matrix agree, and each way in which they could not is found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = 'import pytest\n\n@pytest.mark.control("{mark}")\ndef test_refused():\n    pass\n'
LIST = "- {{id: NET-01, title: Egress is denied, phase: I, state: {state}, tests: [{tests}], note: {note}}}\n"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("saw_controls", ROOT / "scripts/controls.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


controls = load_script()


def repository(
    root: Path, *, state: str = "enforced", tests: str = "tests/test_net.py", mark: str = "NET-01", note: str = "some"
) -> Path:
    (root / "docs").mkdir()
    (root / "tests").mkdir()
    (root / "docs/controls.yml").write_text(LIST.format(state=state, tests=tests, note=note))
    (root / "tests/test_net.py").write_text(TEST.format(mark=mark))
    (root / "README.md").write_text(f"# Title\n{controls.BEGIN}\n{controls.END}\nrest\n")
    assert controls.main(["--write"], root) == 0
    return root


def junit(root: Path, *inner: str, module: str = "test_net", file: str = "") -> str:
    path = root / (file or f"{module}.xml")
    cases = [
        f'<testcase classname="tests.{module}" name="test_refused[{number}]">{text}</testcase>'
        for number, text in enumerate(inner)
    ]
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return str(path)


def test_this_repository_is_consistent(capsys: pytest.CaptureFixture[str]) -> None:
    status = controls.main(["--check"])
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mark": "NET-99", "tests": ""}, "there is no control 'NET-99'"),
        ({"tests": ""}, "enforced without a marked test"),
        ({"tests": "tests/test_other.py"}, "does not exist or lacks the mark"),
        ({"tests": "tests/test_net.py::test_absent"}, "does not exist or lacks the mark"),
        ({"state": "planned"}, "called planned and lists tests"),
        ({"state": "partial", "note": "''"}, "note must say what is missing"),
    ],
)
def test_a_list_that_says_more_than_the_tests_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], words: str
) -> None:
    assert controls.main(["--check"], repository(tmp_path, **change)) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("tests", ["tests/test_net.py", "tests/test_net.py::test_refused"])
def test_a_true_list_passes(tmp_path: Path, tests: str) -> None:
    assert controls.main(["--check"], repository(tmp_path, tests=tests)) == 0


def test_a_stale_matrix_is_found_and_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path)
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("| enforced |", "| planned |"))
    assert controls.main(["--check"], root) == 1
    assert "not current" in capsys.readouterr().err
    assert controls.main(["--write", "--check"], root) == 0
    assert readme.read_text().startswith("# Title\n")
    assert readme.read_text().endswith("\nrest\n")


def test_marks_of_modules_classes_and_parameters_count(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_many.py").write_text(
        'pytestmark = [pytest.mark.control("A")]\n'
        '@pytest.mark.control("B")\nclass TestIt:\n    def test_one(self): ...\n    def helper(self): ...\n'
        '@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.control("C"))])\nasync def test_two(x): ...\n'
    )
    found = {(test.name, test.control) for test in controls.marked_tests(tmp_path)}
    assert found == {("test_one", "A"), ("test_one", "B"), ("test_two", "A"), ("test_two", "C")}


REFUSED = "tests/test_net.py::test_refused"


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ([""], ""),
        (["<failure/>"], f"{REFUSED} failed"),
        (["<error/>"], f"{REFUSED} failed"),
        (["<skipped/>"], f"{REFUSED} was skipped"),
        (["", "<failure/>"], f"{REFUSED} failed"),
        (["", "<skipped/>"], f"{REFUSED} was skipped"),
        ([], f"{REFUSED} did not run"),
    ],
)
def test_an_enforced_control_needs_each_listed_test_to_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inner: list[str], words: str
) -> None:
    root = repository(tmp_path)
    assert controls.main(["--results", junit(root, *inner)], root) == (1 if words else 0)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("inner", "status"), [("<failure/>", 1), ("<skipped/>", 0), ("", 0)])
def test_a_marked_test_that_is_not_listed_may_be_skipped_but_not_fail(tmp_path: Path, inner: str, status: int) -> None:
    root = repository(tmp_path)
    (root / "tests/test_more.py").write_text(TEST.format(mark="NET-01"))
    assert controls.main(["--results", junit(root, ""), junit(root, inner, module="test_more")], root) == status


THOROUGH = '\n\n@pytest.mark.thorough\n@pytest.mark.control("NET-01")\ndef test_deep():\n    pass\n'


def test_a_thorough_test_may_be_left_out_where_another_of_its_file_is_the_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = repository(tmp_path)
    file = root / "tests/test_net.py"
    file.write_text(file.read_text() + THOROUGH)
    assert controls.main(["--check", "--results", junit(root, "")], root) == 0
    file.write_text("import pytest\n" + THOROUGH)
    assert controls.main(["--check"], root) == 1
    assert "lists tests/test_net.py, which `make test` leaves out" in capsys.readouterr().err


def test_a_case_that_is_skipped_in_one_run_and_passed_in_another_has_passed(tmp_path: Path) -> None:
    root = repository(tmp_path)
    again = junit(root, "<skipped/>", file="newer.xml")
    assert controls.main(["--results", junit(root, ""), again], root) == 0
    assert controls.main(["--results", again], root) == 1


@pytest.mark.parametrize(("inner", "status"), [([], 0), ([""], 0), (["<failure/>"], 1), (["<skipped/>"], 1)])
def test_some_lanes_alone_are_judged_by_what_ran_in_them(tmp_path: Path, inner: list[str], status: int) -> None:
    root = repository(tmp_path)
    assert controls.main(["--some", "--results", junit(root, *inner)], root) == status


def test_a_partial_control_needs_none(tmp_path: Path) -> None:
    root = repository(tmp_path, state="partial")
    assert controls.main(["--results", junit(root, "<failure/>")], root) == 0


def test_a_missing_report_is_no_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert controls.main(["--results", str(tmp_path / "absent.xml")], repository(tmp_path)) == 1
    assert "no such file" in capsys.readouterr().err
