"""Which endpoint detection an image carries is an input of its build, and what no image may hold is refused before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_rig import Archive, finished, install, package_set, small_repository

from saw.edr import clamav
from saw.errors import ConfigError
from saw.image import build as image_build
from saw.image import edr as image_edr
from saw.image import inputs as image_inputs
from saw.image.base import base_path
from saw.image.base_os import base_os
from saw.image.build import ImageBuild
from saw.image.edr import NONE, ImageEdr, chosen, variables_file
from saw.image.provenance import Build, statement

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.control("P0-03")
AGENT = "edr_vendor: {deb: agent.deb, service: agent.service, health: [agentctl, health]}\n"


@pytest.fixture
def signatures(tmp_path: Path) -> Path:
    """A folder with one signature, and with a file that is none."""
    folder = tmp_path / "signatures"
    folder.mkdir()
    (folder / "test.hdb").write_text("0" * 32 + ":68:Test\n")
    (folder / "freshclam.dat").write_text("no signature")
    return folder


def variables(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "edr.yml"
    path.write_text(text)
    (tmp_path / "agent.deb").write_bytes(b"package")
    return path


def repository(tmp_path: Path) -> Path:
    root = small_repository(tmp_path / "repository")
    (root / "packer/a.txt").write_text("a")
    return root


OURS = {
    "packer/a.txt", "packer/packages/edr.txt", "packer/packages/workspace.txt", "packer/pkrvars/debian-13.pkrvars.hcl",
}  # fmt: skip


def test_an_image_without_a_choice_is_what_it_was(tmp_path: Path) -> None:
    root = repository(tmp_path)
    assert chosen({}) == chosen({"SAW_IMAGE_EDR": ""}) == chosen({"SAW_IMAGE_EDR": "none"}) == NONE
    plain = image_inputs.collect(root)
    assert plain == image_inputs.collect(root, edr=NONE)
    assert plain.files.keys() == OURS
    assert json.loads(variables_file(NONE)) == {"workspace_converge_edr": "none"}
    assert NONE.packages == ""


def test_what_is_chosen_is_an_input_with_each_of_its_files(tmp_path: Path, signatures: Path) -> None:
    root = repository(tmp_path)
    seen = {image_inputs.collect(root).digest}
    seen.add(image_inputs.collect(root, edr=ImageEdr("embedded")).digest)
    edr = ImageEdr("embedded", variables(tmp_path, "edr_scan_minutes: 30\n"), signatures)
    full = image_inputs.collect(root, edr=edr)
    assert full.options == {"edr": "embedded"}
    assert full.files.keys() == OURS | {"edr/variables.yml", "edr/signatures/test.hdb"}
    seen.add(full.digest)
    (signatures / "test.hdb").write_text("1" * 32 + ":68:Test\n")
    seen.add(image_inputs.collect(root, edr=edr).digest)
    agent = ImageEdr("vendor_package", variables(tmp_path, AGENT))
    assert image_inputs.collect(root, edr=agent).files.keys() == OURS | {"edr/variables.yml", "edr/agent.deb"}
    seen.add(image_inputs.collect(root, edr=agent).digest)
    (tmp_path / "agent.deb").write_bytes(b"another package")
    seen.add(image_inputs.collect(root, edr=agent).digest)
    assert len(seen) == 6


def test_the_provenance_that_the_release_record_names_tells_the_choice(tmp_path: Path) -> None:
    base = tmp_path / "base.tar"
    base.write_bytes(b"tar")

    def told(edr: ImageEdr) -> object:
        inputs = image_inputs.collect(repository(tmp_path / edr.provider), edr=edr)
        made = Build("workspace-a", "0" * 64, inputs, package_set(), base, tmp_path, "a", "b")
        return statement(made, {})["predicate"]["buildDefinition"]["externalParameters"].get("edr")

    assert (told(ImageEdr("embedded")), told(NONE)) == ("embedded", None)


def test_ansible_is_told_of_signatures_and_variables_and_never_of_a_mirror(tmp_path: Path, signatures: Path) -> None:
    edr = chosen(
        {
            "SAW_IMAGE_EDR": "embedded",
            "SAW_IMAGE_EDR_VARIABLES": str(variables(tmp_path, "edr_scan_minutes: 30\n")),
            "SAW_IMAGE_EDR_SIGNATURES": str(signatures),
        }
    )
    assert json.loads(variables_file(edr)) == {
        "workspace_converge_edr": "embedded",
        "edr_scan_minutes": 30,
        "edr_signatures_mirror": "",
        "edr_signatures_files": [str(signatures / "test.hdb")],
    }
    agent = ImageEdr("vendor_package", variables(tmp_path, AGENT))
    assert agent.role_variables()["edr_vendor"]["deb"] == str(tmp_path / "agent.deb")
    assert agent.packages == ""


def test_the_packages_of_the_image_are_those_of_the_role() -> None:
    from saw.image.base import read_packages

    role = (ROOT / "roles/edr/vars/main.yml").read_text()
    assert f"edr_packages: [{', '.join(read_packages(ROOT / 'packer' / image_edr.PACKAGES))}]" in role
    system = base_os(ROOT)
    listing = ROOT / "packer" / system.packages
    more = ROOT / "packer" / ImageEdr("embedded").packages
    assert base_path(listing, Path(), system, package_set(), more=more) != base_path(
        listing, Path(), system, package_set()
    )
    assert image_edr.SIGNATURES == clamav.SIGNATURES


@pytest.mark.parametrize(
    ("provider", "text", "words"),
    [
        ("falco", "", "there is no EDR 'falco' for an image"),
        ("none", "edr_scan_minutes: 30\n", "this image has no EDR"),
        ("embedded", "edr_provider: embedded\n", "edr_provider cannot be set for an image"),
        ("embedded", "edr_signatures_mirror: a\n", "edr_signatures_mirror cannot be set for an image"),
        ("embedded", "baseline_enabled: true\n", "baseline_enabled cannot be set for an image"),
        ("embedded", "[1]\n", "is no file of variables"),
        ("embedded", "edr_a: 1\nedr_a: 2\n", "edr_a comes twice"),
        ("embedded", AGENT, "edr_vendor belongs to EDR=vendor_package"),
        ("vendor_package", "edr_scan_minutes: 30\n", "edr_vendor belongs to EDR=vendor_package"),
        ("vendor_package", "edr_vendor_token: x\n", "edr_vendor_token cannot be set for an image"),
        ("vendor_package", AGENT.replace("deb: agent.deb", "package: agent"), "needs deb and no package"),
        ("vendor_package", AGENT.replace("agent.deb", "absent.deb"), "is no file"),
        (
            "vendor_package",
            AGENT.replace("}", ", token_file: /etc/token}"),
            "edr_vendor.token_file: no agent is enrolled",
        ),
        ("vendor_package", AGENT.replace("}", ", enrol: [a]}"), "edr_vendor.enrol: no agent is enrolled"),
    ],
)
def test_what_an_image_cannot_have_is_refused(tmp_path: Path, provider: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        ImageEdr(provider, variables(tmp_path, text)).files()
    assert refused.value.cure


def test_signatures_that_are_not_there_are_refused(tmp_path: Path, signatures: Path) -> None:
    assert ImageEdr("embedded", None, signatures).files()
    (signatures / "test.hdb").unlink()
    with pytest.raises(ConfigError, match="there are no signatures in"):
        ImageEdr("embedded", None, signatures).files()
    with pytest.raises(ConfigError, match="No such file"):
        ImageEdr("embedded", None, tmp_path / "absent").files()
    with pytest.raises(ConfigError, match="signatures belong to EDR=embedded"):
        ImageEdr("vendor_package", None, signatures)


def test_images_with_and_without_stand_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path)
    builds = {edr.provider: ImageBuild(root, tmp_path / "build", lambda _: None, edr=edr)
              for edr in (NONE, ImageEdr("embedded"))}  # fmt: skip
    install(Archive(), monkeypatch)
    images = {
        provider: finished(build, build.sources(), f"2026-01-0{number + 1}", package_set())
        for number, (provider, build) in enumerate(builds.items())
    }
    for provider, build in builds.items():
        found, reason = build.ensure()
        assert (found, reason[:6]) == (images[provider], "reused"), "the newer one is of the other kind"
    for number in range(3):
        finished(builds["none"], image_inputs.Inputs(f"{number}" * 64, {}), f"2026-03-0{number + 1}")
    builds["none"].prune()
    assert not Path(images["none"].directory).exists()
    assert Path(images["embedded"].directory).exists(), "the images of one kind do not push out those of the other"
    options = ["image", "--repository", str(root), "--build", str(tmp_path / "build"), "--json"]
    assert image_build.main([*options, "--edr", "embedded"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == images["embedded"].name
    assert image_build.main([*options, "--edr", "none", "--edr-signatures", str(tmp_path)]) == 1
    assert "this image has no EDR" in capsys.readouterr().err
