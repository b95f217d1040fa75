"""The glass is broken by people at their keys: with passkeys on the pages, and with registered keys on the command line."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_rig import cli
from sso_rig import SsoLab, sso_lab

from saw.broker.break_glass_settings import BreakGlassSettings

KEYS = "break-glass"
WHY = "the payroll run of today fails without it"


@pytest.fixture(scope="module")
def lab() -> Iterator[SsoLab]:
    with sso_lab(Path(tempfile.mkdtemp(prefix="saw-glass-")), break_glass=BreakGlassSettings(group=KEYS)) as found:
        found.activate("ws-a", "ws-b")
        yield found


@pytest.mark.control("REV-02")
def test_two_people_break_it_with_passkeys_and_another_looks_afterwards(lab: SsoLab) -> None:
    review = lab.open_review(body=b'{"pay": 1}', workspace="ws-a")
    with lab.browser() as dora, lab.browser() as emil, lab.browser() as ben:
        held = {
            name: lab.member(browser, f"u-{name}", "staff", "approvers", KEYS)
            for name, browser in (("dora", dora), ("emil", emil))
        }
        key = lab.member(ben, "u-ben-2")
        denied = lab.open_review(body=b'{"pay": 3}', workspace="ws-a")
        assert dora.get(f"/reviews/{denied}").status_code == 200
        assert ben.decide(denied, key, "deny").json()["state"] == "denied"
        assert dora.get(f"/reviews/{denied}").status_code == 404, "what has ended is no matter of theirs"
        page = dora.get(f"/reviews/{review}").text
        assert "Break the glass with passkey" in page
        assert "Approve with passkey" not in page
        assert "Break the glass" not in ben.get(f"/reviews/{review}").text
        refused = dora.decide(review, held["dora"], "break_glass")
        assert (refused.status_code, refused.json()["error"]) == (400, "reason_missing")
        assert dora.decide(review, held["dora"], "break_glass", comment=WHY).json()["state"] == "pending"
        assert "Break the glass with passkey" not in dora.get(f"/reviews/{review}").text
        assert ben.decide(review, key, "break_glass", comment=WHY).json()["error"] == "not_in_group"
        assert emil.decide(review, held["emil"], "break_glass", comment=WHY).json()["state"] == "approved"
        assert lab.claims() == [review]
        # Everybody who sees it is told, and those of the group are asked.
        assert "The glass was broken" in ben.get(f"/reviews/{review}").text
        assert review in ben.get("/reviews?show=after").text
        assert "uphold" not in dora.get(f"/reviews/{review}").text
        upheld = ben.decide(review, key, "uphold", comment="payroll would have failed")
        assert upheld.status_code == 200, upheld.text
        assert review not in ben.get("/reviews?show=after").text
    assert lab.show(review)["after_state"] == "upheld"
    alarms = lab.audited(class_uid=2004, review=review)
    assert [one["severity"] for one in alarms] == ["High", "Critical"]


@pytest.mark.control("REV-02")
def test_registered_keys_break_it_on_the_command_line_and_a_receipt_says_so(lab: SsoLab, tmp_path: Path) -> None:
    review = lab.open_review(body=b'{"pay": 2}', workspace="ws-b")
    for name, group in (("gus", KEYS), ("hal", KEYS), ("ida", "maintainers")):
        assert cli(lab, "policy", "keys", "create", "--dir", str(tmp_path), "--name", name).returncode == 0
        key = str(tmp_path / f"{name}.pub")
        added = cli(lab, "review", "reviewer", "add", f"{name}@example.com", "--group", group, "--key", key)
        assert added.returncode == 0, added.stderr

    def run(what: str, name: str, *more: str) -> str:
        done = cli(lab, "review", what, review, "--key", str(tmp_path / f"{name}.key"), "--yes", *more)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).splitlines()[-1]

    silent = cli(lab, "review", "break-glass", review, "--key", str(tmp_path / "gus.key"), "--yes")
    assert silent.returncode == 2
    assert "--comment" in silent.stderr
    said = run("break-glass", "gus", "--comment", WHY)
    assert said.endswith("is pending; approved by nobody yet; signed to break the glass: gus@example.com")
    assert "is approved" in run("break-glass", "hal", "--comment", WHY)
    assert lab.claims() == [review]
    owed = json.loads(cli(lab, "review", "list", "--owed", "--json").stdout)["reviews"]
    assert review in [one["id"] for one in owed]
    assert "after-review rejected" in run("reject", "ida", "--comment", "it could have waited")
    with lab.tls("perimeter", "edge") as client:
        assert client.get("/v1/perimeter/reviews/" + review, params={"workspace_id": "ws-b"}).status_code == 200
    shown = cli(lab, "review", "show", review).stdout
    assert "broken_at" in shown
    assert "after_state" in shown


def test_a_list_that_is_asked_wrongly_is_refused(lab: SsoLab) -> None:
    with pytest.raises(Exception, match=r"\$\.owed"):
        lab.operator.request("GET", "/v1/reviews?owed=perhaps")
    assert lab.operator.request("GET", "/v1/reviews?owed=true")["reviews"] is not None
