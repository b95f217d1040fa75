"""The entry point: areas, exit codes, and errors for people and for programs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import saw
from saw.cli import lab as lab_cli
from saw.cli import main as cli
from saw.errors import SawError
from saw.lab import main_job, up


def test_help_lists_every_area_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "-h", "help"):
        assert cli.main([word]) == 0
        shown = capsys.readouterr().out
        assert all(f"  {area:<10} " in shown for area in cli.AREAS)


def test_no_arguments_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: saw AREA" in capsys.readouterr().out


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"saw {saw.__version__}\n"


def test_an_unknown_area_is_wrong_usage_and_says_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clouds"]) == 2
    assert capsys.readouterr().err == "saw: there is no area 'clouds'; saw --help lists them\n"


@pytest.mark.parametrize("area", sorted(cli.AREAS))
def test_every_area_has_a_main_and_explains_itself(area: str, capfd: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(cli.AREAS[area][0])
    assert callable(module.main)
    try:
        code: object = cli.main([area, "--help"])
    except SystemExit as ended:  # argparse ends by itself
        code = ended.code
    assert code == 0
    assert f"saw {area}" in capfd.readouterr().out


def test_a_refusal_is_words_for_people_and_json_for_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(argv: list[str]) -> int:
        raise SawError("no", cure="say please", details={"n": 1})

    monkeypatch.setattr("saw.cli.vm.main", refuse)
    assert cli.main(["vm", "list"]) == 1
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "saw vm: no (say please)\n")
    assert cli.main(["vm", "list", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "ok": False,
        "error": {"code": "error", "message": "no", "cure": "say please", "details": {"n": 1}},
    }


def test_an_interrupt_is_130_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("saw.cli.vm.main", interrupted)
    assert cli.main(["vm", "list"]) == 130
    assert capsys.readouterr().err == "saw vm: interrupted\n"


def test_the_overview_imports_no_area() -> None:
    program = (
        "import sys; from saw.cli import main; main.main(['--help']); "
        "print([name for name in sys.modules if name.startswith('saw.cli.') and name != 'saw.cli.main'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


AS_ON_A_HOST = """
import importlib, sys
from importlib.metadata import distribution, packages_distributions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

there, left = set(), [("secure-agent-workspace", ())]
while left:  # the distribution, what it needs, and what that needs
    name, extras = left.pop()
    if canonicalize_name(name) in there:
        continue
    there.add(canonicalize_name(name))
    for line in distribution(name).requires or ():
        one = Requirement(line)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            left.append((one.name, one.extras))
refused = {
    module for module, owners in packages_distributions().items() if not there & {canonicalize_name(one) for one in owners}
}

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r} on a host")

for name in list(sys.modules):
    if name.partition(".")[0] in refused:
        del sys.modules[name]
sys.meta_path.insert(0, Refuses())
assert "packaging" in refused
from saw.cli import main
for area in main.AREAS:
    try:
        code = main.main([area, "--help"])
    except SystemExit as ended:
        code = ended.code
    assert not code, area
"""


def test_every_area_is_there_with_what_the_distribution_itself_needs() -> None:
    """Hosts get no groups: what makes images, and what tests, is on the machine that does it alone."""
    done = subprocess.run([sys.executable, "-c", AS_ON_A_HOST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_lab_verbs_reach_the_job_with_their_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAW_BUILD", str(tmp_path))
    calls: list[object] = []
    monkeypatch.setattr(main_job, "bring_up", lambda lab, *, keep_image: calls.append((lab.build, keep_image)) or 7)
    monkeypatch.setattr(up, "tear_down", lambda _, *, purge: calls.append(purge))
    monkeypatch.setattr(up, "lifecycle", lambda _, verb, reason: calls.append((verb, reason)))
    assert lab_cli.main(["up", "--keep-image"]) == 7
    assert lab_cli.main(["down", "--purge"]) == 0
    assert lab_cli.main(["down"]) == 0
    assert lab_cli.main(["kill", "--reason", "it misbehaves"]) == 0
    assert calls == [(tmp_path, True), True, False, ("kill", "it misbehaves")]
    capsys.readouterr()
    assert lab_cli.main(["status", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {
        name: {"address": f"10.77.0.{number}", "running": False}
        for name, number in (("control", 10), ("edge", 20), ("enterprise", 30))
    }
    with pytest.raises(SystemExit) as ended:
        lab_cli.main(["explode"])
    assert ended.value.code == 2
