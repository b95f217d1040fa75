"""Which packages the next image gets: newer ones when the archive has them, what is known when it is away; no image is lost."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from image_rig import OLD, Archive, cached, finished, install, package_set, small_repository

from saw.errors import ConfigError
from saw.image import package_state
from saw.image.build import ImageBuild
from saw.image.disk import ImageError
from saw.image.finished import packages_of
from saw.image.package_state import Choice, chosen
from saw.image.packages import FILE, IndexAway, IndexOlder, PackageSet, write_set

pytestmark = pytest.mark.control("P0-02")
NEWER = package_set({**OLD, "openssl": "3.5.1-1+deb13u1", "bash": "5.2-2"}, "openssl", asked="2026-02-01")


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Archive:
    return install(Archive(), monkeypatch)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def build(tmp_path: Path, said: list[str]) -> ImageBuild:
    return ImageBuild(small_repository(tmp_path / "repository"), tmp_path / "build", said.append)


def choosing(build: ImageBuild, choice: Choice) -> ImageBuild:
    return ImageBuild(build.repository, build.build, build.say, choice=choice)


# --- newer packages ------------------------------------------------------------------------------------------------------


def test_newer_packages_make_a_newer_image_though_no_source_has_changed(build: ImageBuild, archive: Archive) -> None:
    first, _ = build.ensure()
    assert build.ensure()[0] == first, "the archive says the same as before"
    archive.answer = NEWER
    second, reason = build.ensure()
    assert reason == (
        "rebuilt: 2 packages are newer (1 of them for security): openssl 3.5.1-1 → 3.5.1-1+deb13u1, bash 5.2-1 → 5.2-2"
    )
    assert second.inputs_digest != first.inputs_digest
    assert [one.packages for one in archive.made] == [OLD, NEWER.packages]
    assert build.ensure()[0] == second
    assert Path(first.directory, "image.qcow2").exists()
    kept = packages_of(second)
    assert kept == NEWER


def test_equal_packages_give_equal_digests_on_whatever_day(build: ImageBuild, archive: Archive) -> None:
    first, _ = build.ensure()
    archive.answer = package_set(OLD, "bash", asked="2026-06-01")
    assert build.ensure()[0] == first
    assert archive.answer.digest == package_set().digest
    assert package_set(dict(reversed(OLD.items()))).digest == archive.answer.digest
    assert package_set({"a": "1", "b": "2"}).digest != package_set({"a": "1"}).digest


def test_an_image_of_a_release_that_recorded_no_packages_is_built_anew(build: ImageBuild, archive: Archive) -> None:
    old = finished(build, build.sources())
    made, reason = build.ensure()
    assert (made == old, reason) == (False, "rebuilt: the packages of the newest image are not known")
    assert choosing(build, Choice("reuse")).ensure()[0] == made


# --- without the archive -------------------------------------------------------------------------------------------------


def test_an_archive_that_is_away_is_told_and_the_image_is_reused(build: ImageBuild, archive: Archive) -> None:
    first, _ = build.ensure()
    archive.away = "Could not resolve the mirror"
    found, reason = build.ensure()
    assert found == first
    assert "the archive is away, packages as of 2026-01-01" in reason
    assert reason.endswith("are kept: Could not resolve the mirror")
    with pytest.raises(IndexAway, match="Could not resolve the mirror"):
        choosing(build, Choice("fresh")).ensure()


def test_without_the_archive_changed_sources_are_built_on_the_tree_that_is_there(
    build: ImageBuild, archive: Archive
) -> None:
    build.ensure()
    archive.away = "no route"
    (build.repository / "uv.lock").write_text("changed")
    assert build.ensure()[1] == "rebuilt: uv.lock changed"
    assert archive.made[-1] == package_set()
    for tar in build.base.cache.glob("*.tar"):
        tar.unlink()
    (build.repository / "uv.lock").write_text("changed again")
    with pytest.raises(IndexAway):
        build.ensure()


def test_nothing_known_and_no_archive_is_refused(build: ImageBuild, archive: Archive) -> None:
    archive.away = "no route"
    for mode in ("ask", "fresh", "reuse"):
        with pytest.raises(IndexAway, match="no route"):
            choosing(build, Choice(mode)).ensure()


def test_reuse_does_not_ask_unless_nothing_is_known(build: ImageBuild, archive: Archive) -> None:
    quiet = choosing(build, Choice("reuse"))
    first, _ = quiet.ensure()
    assert archive.asked == 1
    archive.answer = NEWER
    found, reason = quiet.ensure()
    assert (found, archive.asked) == (first, 1)
    assert "the archive was not asked: packages as of 2026-01-01" in reason
    (build.repository / "uv.lock").write_text("changed")
    quiet.ensure()
    assert (archive.asked, archive.made[-1]) == (1, package_set())


def test_a_package_set_can_be_pinned(build: ImageBuild, archive: Archive, tmp_path: Path) -> None:
    first, _ = build.ensure()
    archive.answer = NEWER
    second, _ = build.ensure()
    pinned = choosing(build, Choice("reuse", Path(first.directory) / FILE))
    found, reason = pinned.ensure()
    assert (found, archive.asked) == (first, 2)
    assert f"pinned to {first.directory}/{FILE}" in reason
    assert choosing(build, Choice("reuse", Path(second.directory) / FILE)).ensure()[0] == second
    other = PackageSet("forky", "2026-01-01T00:00:00+00:00", "", OLD)
    write_set(tmp_path / "other.json", other)
    with pytest.raises(ImageError, match="is of forky, the image of trixie"):
        choosing(build, Choice("reuse", tmp_path / "other.json")).ensure()
    (tmp_path / "other.json").write_text(
        '{"suite": "trixie", "asked": "", "index": "", "packages": {"a\\nPin: x": "1"}}'
    )
    with pytest.raises(ImageError, match="is no package set"):
        choosing(build, Choice("reuse", tmp_path / "other.json")).ensure()


# --- an archive that goes back -------------------------------------------------------------------------------------------


def test_older_packages_are_not_taken_unless_somebody_says_so(build: ImageBuild, archive: Archive) -> None:
    archive.answer = NEWER
    first, _ = build.ensure()
    archive.answer = package_set({**OLD, "bash": "5.3-1"}, "bash")
    found, reason = build.ensure()
    assert found == first
    assert "the archive offers older packages than the newest image has" in reason
    with pytest.raises(IndexOlder, match=re.escape("1 older: openssl 3.5.1-1+deb13u1 → 3.5.1-1")) as refused:
        choosing(build, Choice("fresh")).ensure()
    assert "OLDER=1" in refused.value.cure
    made, _ = choosing(build, Choice("fresh", older=True)).ensure()
    assert packages_of(made) == archive.answer


# --- going back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ask", "reuse"])
def test_going_back_to_earlier_sources_finds_their_image_as_it_was(
    build: ImageBuild, archive: Archive, mode: str
) -> None:
    build = choosing(build, Choice(mode))
    (build.repository / "uv.lock").write_text("first")
    first, _ = build.ensure()
    record, disk = Path(first.directory, "release.json"), Path(first.image)
    record.write_text("{}")
    before = (record.stat().st_ino, disk.stat().st_ino)
    (build.repository / "uv.lock").write_text("second")
    second, _ = build.ensure()
    (build.repository / "uv.lock").write_text("first")
    found, reason = build.ensure()
    assert (found, reason.startswith("reused")) == (first, True)
    assert (record.stat().st_ino, disk.stat().st_ino) == before
    assert len(archive.made) == 2
    (build.repository / "uv.lock").write_text("second")
    assert build.ensure()[0] == second


def test_going_back_without_asking_finds_the_image_though_the_packages_are_older(
    build: ImageBuild, archive: Archive
) -> None:
    (build.repository / "uv.lock").write_text("first")
    first, _ = build.ensure()
    archive.answer = NEWER
    (build.repository / "uv.lock").write_text("second")
    build.ensure()
    (build.repository / "uv.lock").write_text("first")
    assert choosing(build, Choice("reuse")).ensure()[0] == first


# --- the choice ----------------------------------------------------------------------------------------------------------


def test_a_choice_is_read_strictly(tmp_path: Path) -> None:
    assert (chosen("ask", {}), chosen("reuse", {})) == (Choice("ask"), Choice("reuse"))
    assert chosen("reuse", {"SAW_IMAGE_PACKAGES": "fresh", "SAW_IMAGE_OLDER": "1"}) == Choice("fresh", None, True)
    assert chosen("ask", {"SAW_IMAGE_PACKAGES": f"{tmp_path}/a.json"}) == Choice("reuse", tmp_path / "a.json")
    for wrong in ({"SAW_IMAGE_PACKAGES": "newest"}, {"SAW_IMAGE_OLDER": "yes"}):
        with pytest.raises(ConfigError):
            chosen("ask", wrong)


# --- what waits ----------------------------------------------------------------------------------------------------------


def test_an_image_in_use_is_told_what_waits_and_the_archive_is_asked_once_a_day(
    build: ImageBuild, archive: Archive, said: list[str]
) -> None:
    image = finished(build, build.sources(), packages=package_set())
    build.news(image)
    assert (archive.asked, "none newer is known (asked 2026-01-01)" in said[-1]) == (1, True)
    archive.answer = package_set({**OLD, "bash": "5.2-2"}, asked=f"{datetime.now(UTC):%Y-%m-%d}")
    build.news(image)
    assert (archive.asked, "1 package is newer (none of them for security)" in said[-1]) == (2, True), (
        "that was long ago"
    )
    archive.answer = NEWER
    build.news(image)
    assert archive.asked == 2, "it was asked today"
    _since(build, timedelta(days=2))
    build.news(image)
    assert archive.asked == 3
    assert said[-1].startswith("SECURITY UPDATES wait for a newer image; packages as of 2026-01-01")


def test_an_archive_that_is_away_is_not_asked_again_on_that_day_and_what_it_said_before_counts(
    build: ImageBuild, archive: Archive, said: list[str]
) -> None:
    image = finished(build, build.sources(), packages=package_set())
    archive.answer = NEWER
    build.base.ask()
    _since(build, timedelta(days=2))
    archive.away = "no route"
    build.news(image)
    assert said[-2] == "the archive cannot be asked what is newer: no route"
    assert "SECURITY UPDATES" in said[-1]
    build.news(image)
    assert (archive.asked, len(said)) == (2, 3)
    build.news(finished(build, build.sources()))
    assert said[-1].startswith("the packages of this image are of an unknown day")


def _since(build: ImageBuild, ago: timedelta) -> None:
    """Let the last asking be ``ago``."""
    last = build.base.asked()
    assert last is not None
    tried = (datetime.now(UTC) - ago).isoformat(timespec="seconds")
    build.base.memory.write_bytes(msgspec.json.encode(msgspec.structs.replace(last, tried=tried)))


def test_a_tree_without_its_package_set_is_not_known(build: ImageBuild) -> None:
    tar = cached(build.base, package_set())
    assert build.base.known() == [package_set()]
    tar.with_suffix(".packages.json").unlink()
    assert build.base.known() == []
    assert package_state.MODES == ("ask", "fresh", "reuse")
