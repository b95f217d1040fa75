"""The way back is signed before the release is out: where the broker wants it, no workspace is offered a release without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_rig import running_broker
from cryptography.hazmat.primitives import serialization
from test_rollout_commands import POLICY, Ring

from saw.broker.config import RolloutSettings
from saw.cli.policy_signing import save_publication
from saw.files import write_private


class Desk(Ring):
    """A ring whose officers work with commands alone."""

    def key(self, number: int) -> str:
        """The key file of an officer."""
        place = self.lab.directory / f"officer-{number}.key"
        if not place.exists():
            form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            write_private(place, self.lab.officers.keys[number].private_bytes(*form))
        return str(place)

    def staged(self, revision: int, ring: str = "stable") -> str:
        """The folder of a signed publication that is not handed over."""
        content = POLICY.replace("REVISION", str(revision))
        self.digests[revision], made = self.lab.officers.publication(revision, ring=ring, content=content)
        folder = str(self.lab.directory / f"publication-{ring}-{revision}")
        save_publication(folder, made)
        return folder

    def hand_over(self, folder: str) -> None:
        code, answer = self.saw("publish", folder, "--repository", str(self.lab.officers.directory))
        assert code == 0, answer

    def way_back(self, folder: str, *officers: int, to: int = 1) -> tuple[int, dict]:
        """Prepare the way back from a publication with these officers' keys."""
        keys = [word for officer in officers for word in ("--key", self.key(officer))]
        copy = str(self.lab.officers.directory)
        return self.saw("way-back", folder, "--repository", copy, "--to", str(to), "--out", self.out(folder), *keys)

    @staticmethod
    def out(folder: str) -> str:
        return f"{folder}-way-back"

    def given(self, name: str) -> int:
        return int(self.saw("status", name)[1]["given_revision"])


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A broker that wants a way back; workspace ``a`` runs revision 1."""
    with running_broker(rollout=RolloutSettings(require_rollback=True)) as lab:
        made = Desk(lab)
        made.hand_over(made.staged(1))
        lab.workspace("a")
        made.load("a", 1)
        yield made


@pytest.mark.control("LIF-03")
def test_the_way_back_is_signed_before_the_release_is_out_and_taken_when_it_is_halted(desk: Desk) -> None:
    folder = desk.staged(2)
    before = sorted(path.name for path in desk.lab.officers.directory.rglob("*"))
    code, made = desk.way_back(folder, 0, 1)
    assert (code, made["complete"], made["published"]) == (0, True, False)
    assert sorted(path.name for path in desk.lab.officers.directory.rglob("*")) == before, "the copy stays as it is"
    desk.hand_over(folder)
    assert desk.given("a") == 1, "nobody is offered it before the way back is in escrow"
    assert desk.saw("escrow", desk.out(folder), "--ring", "stable")[0] == 0
    assert desk.given("a") == 2
    desk.say("a", "refused", 2, "validate_failed")
    [newest, halted, _] = desk.lab.operator.request("GET", "/v1/policy/rollouts/stable")["rollouts"]
    assert (newest["revision"], newest["returns_to"], halted["state"]) == (3, 1, "halted")


def test_officers_sign_the_way_back_one_after_the_other(desk: Desk) -> None:
    folder = desk.staged(2)
    code, first = desk.way_back(folder, 0)
    assert (code, first["complete"]) == (1, False)
    assert first["owed"][0]["item"].startswith("bundle rings/stable/coding")
    code, second = desk.way_back(folder, 1)
    assert (code, [one["item"].split()[0] for one in second["owed"]]) == (1, ["targets"])
    code, third = desk.way_back(folder, 0)
    assert (code, third["complete"], third["begun_again"]) == (0, True, False)


def test_no_way_back_is_made_of_a_release_that_lacks_signatures(desk: Desk) -> None:
    folder = desk.staged(2)
    good = Path(folder, "metadata/targets.json").read_bytes()
    Path(folder, "metadata/targets.json").write_bytes(good.replace(b'"sig": "', b'"sig": "00', 1))
    code, refused = desk.way_back(folder, 0, 1)
    assert (code, refused["error"]["code"]) == (1, "threshold")
    assert not Path(desk.out(folder)).exists()
    Path(folder, "metadata/targets.json").write_bytes(good)
    assert desk.way_back(folder, 0, 1)[0] == 0
    code, unknown = desk.way_back(folder, 0, 1, to=7)
    assert (code, unknown["error"]["code"]) == (1, "not_found")


def test_a_way_back_that_somebody_published_past_is_begun_again(desk: Desk) -> None:
    folder = desk.staged(2)
    assert desk.way_back(folder, 0, 1)[0] == 0
    desk.hand_over(folder)
    desk.hand_over(desk.staged(1, ring="canary"))
    code, refused = desk.saw("escrow", desk.out(folder), "--ring", "stable")
    assert (code, refused["error"]["code"]) == (1, "stale_base")
    code, again = desk.way_back(folder, 0, 1)
    assert (code, again["begun_again"]) == (0, True)
    assert desk.saw("escrow", desk.out(folder), "--ring", "stable")[0] == 0
    assert desk.given("a") == 2
