"""The vm module: what it asks the driver for, what it forecasts, and how an error reaches the play."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.secure_agent.workspace.plugins.modules import vm

# A driver with the contract of docs/drivers.md and a state of two files; every call is recorded.
DRIVER = """#!{python} -I
import json, pathlib, sys
home = pathlib.Path({home!r})
verb, *rest = sys.argv[2:-1]
assert sys.argv[1] == "vm" and sys.argv[-1] == "--json", sys.argv
with (home / "calls").open("a") as stream:
    stream.write(verb + "\\n")
active = home / "active"
if (home / "broken").exists():
    print((home / "broken").read_text())
    print("saw vm: it broke", file=sys.stderr)
    sys.exit(1)
answer = {{"ok": True, "changed": False}}
if verb == "create":
    raw = sys.stdin.read()
    spec = json.loads(raw)
    stored = home / "vms" / spec["id"] / "spec.json"
    stored.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(stored.read_text()) if stored.exists() else None
    answer.update(changed=old != spec, ek_pub_pem="-----BEGIN PUBLIC KEY-----\\n", directory=str(stored.parent))
    stored.write_text(raw)
elif verb == "status":
    answer.update(id=rest[0], active=active.exists())
elif verb == "accept":
    handed = sys.stdin.read()
    kept = home / "handed"
    answer["changed"] = not kept.exists() or kept.read_text() != handed
    if "--dry-run" not in rest:
        kept.write_text(handed)
elif verb == "start":
    answer["changed"] = not active.exists()
    active.touch()
elif verb in ("stop", "poweroff", "destroy"):
    answer["changed"] = active.exists()
    active.unlink(missing_ok=True)
    if verb == "destroy":
        (home / "vms" / rest[0] / "spec.json").unlink()
        if (home / "erased").exists():
            answer["erased"] = {{"format": "saw-erasure/1"}}
print(json.dumps(answer))
"""
WANTED: dict[str, Any] = {"id": "ws-t", "number": 3, "image": "/i/image.qcow2", "image_sha256": "a" * 64}


class Driver:
    """The driver's executable and its record."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.program = home / "saw"
        # Written by another process: what a thread of this one forks meanwhile would keep it open, and it could not be run.
        text = DRIVER.format(python=sys.executable, home=str(home))
        subprocess.run(["install", "-m", "755", "/dev/stdin", str(self.program)], input=text, text=True, check=True)

    def calls(self) -> list[str]:
        """Return the verbs called since the last look."""
        log = self.home / "calls"
        found = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    def spec(self) -> dict[str, Any]:
        return dict(json.loads((self.home / "vms/ws-t/spec.json").read_text()))


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(tmp_path)
    monkeypatch.setattr(vm, "SAW", str(made.program))
    monkeypatch.setattr(vm, "STATE", str(tmp_path / "vms"))
    return made


Run = Callable[..., Any]


def test_check_mode_forecasts_and_changes_nothing_then_a_run_does_it_and_a_second_is_quiet(
    driver: Driver, run_module: Run
) -> None:
    forecast = run_module(vm, check=True, **WANTED)
    assert forecast["changed"]
    assert forecast["diff"] == {
        "before": {"state": "absent", "image_sha256": None},
        "after": {"state": "started", "image_sha256": "a" * 64},
    }
    assert driver.calls() == []
    assert not (driver.home / "vms").exists()
    done = run_module(vm, **WANTED)
    assert done["changed"]
    assert done["active"]
    assert done["diff"] == forecast["diff"]
    assert done["ek_pub_pem"].startswith("-----BEGIN PUBLIC KEY-----")
    assert driver.calls() == ["create", "start", "status"]
    again = run_module(vm, **WANTED)
    assert not again["changed"]
    assert again["diff"]["before"] == again["diff"]["after"]
    assert "start" not in driver.calls()
    assert not run_module(vm, check=True, **WANTED)["changed"]


def test_credentials_are_handed_over_as_text_and_defaults_are_the_drivers(driver: Driver, run_module: Run) -> None:
    run_module(vm, **WANTED, credentials={"saw.workspace": {"b": 1, "a": "x"}, "plain": "text"})
    spec = driver.spec()
    assert spec["credentials"] == {"saw.workspace": '{"a": "x", "b": 1}', "plain": "text"}
    assert (spec["memory_mib"], spec["cpus"], spec["data_disk_mib"], spec["accel"]) == (1536, 2, 2048, "auto")


def test_a_recovery_key_is_handed_over_and_an_older_specification_without_one_is_the_same(
    driver: Driver, run_module: Run
) -> None:
    run_module(vm, **WANTED)
    old = driver.spec()
    assert (old.pop("data_disk_recovery_key"), old.pop("data_disk_secure_boot")) == ("", True)
    (driver.home / "vms/ws-t/spec.json").write_text(json.dumps(old))
    assert not run_module(vm, check=True, **WANTED)["changed"]
    told = {"data_disk_recovery_key": "-----BEGIN PUBLIC KEY-----", "data_disk_secure_boot": False}
    assert run_module(vm, **WANTED, **told)["changed"]
    assert driver.spec() == {**old, **told}


def test_the_evidence_of_an_erased_data_disk_is_returned(driver: Driver, run_module: Run) -> None:
    run_module(vm, **WANTED)
    (driver.home / "erased").touch()
    assert run_module(vm, id="ws-t", state="absent")["erased"] == {"format": "saw-erasure/1"}


def test_another_image_stops_the_vm_before_the_root_disk_is_made_again(driver: Driver, run_module: Run) -> None:
    run_module(vm, **WANTED)
    driver.calls()
    other = {**WANTED, "image": "/i/next.qcow2", "image_sha256": "b" * 64}
    forecast = run_module(vm, check=True, **other)
    assert forecast["changed"]
    assert (forecast["diff"]["before"]["image_sha256"], forecast["diff"]["after"]["image_sha256"]) == (
        "a" * 64,
        "b" * 64,
    )
    assert driver.calls() == ["status"]
    assert driver.spec()["image_sha256"] == "a" * 64
    assert run_module(vm, **other)["active"]
    assert driver.calls() == ["status", "stop", "create", "start", "status"]


@pytest.mark.parametrize(("state", "verb"), [("stopped", "stop"), ("killed", "poweroff"), ("absent", "destroy")])
def test_ending_a_vm_asks_for_the_right_verb_once(driver: Driver, run_module: Run, state: str, verb: str) -> None:
    run_module(vm, **WANTED)
    driver.calls()
    forecast = run_module(vm, check=True, id="ws-t", state=state)
    assert forecast["changed"]
    assert driver.calls() == ["status"]
    done = run_module(vm, id="ws-t", state=state)
    assert done["changed"]
    assert not done["active"]
    assert driver.calls()[:2] == ["status", verb]
    assert not run_module(vm, id="ws-t", state=state)["changed"]
    assert verb not in driver.calls()


def test_created_makes_and_does_not_start(driver: Driver, run_module: Run) -> None:
    done = run_module(vm, **WANTED, state="created")
    assert done["changed"]
    assert not done["active"]
    assert driver.calls() == ["create", "status"]
    assert not run_module(vm, **WANTED, state="created")["changed"]


def test_created_with_another_image_forecasts_that_the_vm_is_stopped(driver: Driver, run_module: Run) -> None:
    run_module(vm, **WANTED)
    same = run_module(vm, check=True, **WANTED, state="created")
    assert same["diff"]["after"]["state"] == "started"
    other = {**WANTED, "image_sha256": "b" * 64, "state": "created"}
    forecast = run_module(vm, check=True, **other)
    assert forecast["diff"]["after"]["state"] == "stopped"
    assert not run_module(vm, **other)["active"]


def test_the_drivers_own_error_reaches_the_play(driver: Driver, run_module: Run) -> None:
    error = {"code": "vm_failed", "message": "image /i/x is not on this hypervisor", "cure": "build it", "details": {}}
    (driver.home / "broken").write_text(json.dumps({"ok": False, "error": error}))
    failed = run_module(vm, **WANTED)
    assert failed.failed
    assert failed["msg"] == "image /i/x is not on this hypervisor (build it)"
    assert failed["failure"] == error
    (driver.home / "broken").unlink()
    assert not run_module(vm, **WANTED).failed


def test_an_error_without_words_still_has_a_cure(driver: Driver, run_module: Run) -> None:
    (driver.home / "broken").write_text("Traceback")
    failed = run_module(vm, **WANTED)
    assert failed["failure"]["code"] == "vm_failed"
    assert failed["failure"]["message"] == "saw vm: it broke"


def test_a_host_without_the_runtime_is_told_which_roles_bring_it(driver: Driver, run_module: Run) -> None:
    driver.program.unlink()
    failed = run_module(vm, **WANTED)
    assert failed["msg"] == (
        f"{driver.program} is not installed here (apply the saw_runtime and hypervisor roles to this host)"
    )
    assert failed["failure"]["code"] == "vm_failed"


def test_creating_needs_number_image_and_digest(driver: Driver, run_module: Run) -> None:
    for some in ({"state": "created"}, {"state": "started", "image": "/i/image.qcow2"}):
        failed = run_module(vm, id="ws-t", **some)
        assert failed.failed
        assert "number, image, image_sha256" in failed["msg"]
    assert driver.calls() == []


def test_without_an_image_a_vm_is_run_as_it_was_made(driver: Driver, run_module: Run) -> None:
    run_module(vm, **{**WANTED, "memory_mib": 4096}, state="created")
    made = driver.spec()
    driver.calls()
    assert run_module(vm, check=True, id="ws-t")["changed"]
    started = run_module(vm, id="ws-t")
    assert started["changed"]
    assert started["active"]
    assert driver.calls() == ["status", "status", "start", "status"]
    assert not run_module(vm, id="ws-t")["changed"]
    assert driver.spec() == made


@pytest.mark.control("P0-04")
def test_what_is_handed_over_comes_before_the_vm_and_is_forecast(driver: Driver, run_module: Run) -> None:
    handed = {"roots": [{"signed": {"version": 1}}], "records": [], "revoked": []}
    assert run_module(vm, check=True, **WANTED, handed=handed)["changed"]
    assert not (driver.home / "handed").exists()
    assert run_module(vm, **WANTED, state="created", handed=handed)["changed"]
    assert driver.calls() == ["accept", "accept", "create", "status"]
    assert json.loads((driver.home / "handed").read_text()) == handed
    assert not run_module(vm, **WANTED, state="created", handed=handed)["changed"]
    # A record that was signed anew is news by itself, and is there before the start.
    newer = {**handed, "records": [{"payload": "b"}]}
    assert run_module(vm, check=True, **WANTED, state="created", handed=newer)["changed"]
    driver.calls()
    assert run_module(vm, id="ws-t", handed=newer)["changed"]
    assert driver.calls() == ["status", "accept", "start", "status"]
    # What runs already, and what ends, is handed nothing.
    assert not run_module(vm, id="ws-t", handed=handed)["changed"]
    assert run_module(vm, id="ws-t", state="stopped", handed=handed)["changed"]
    assert "accept" not in driver.calls()


def test_what_is_documented_is_what_is_returned(driver: Driver, run_module: Run) -> None:
    documented = yaml.safe_load(vm.RETURN)
    result = run_module(vm, **WANTED)
    assert set(documented) - {"failure", "erased"} <= set(result)
    kinds = {"str": str, "bool": bool, "dict": dict}
    for name in set(documented) - {"failure", "erased"}:
        assert isinstance(result[name], kinds[documented[name]["type"]]), name
