"""Parts of patching by themselves: configuration, sources, window, need of a restart, holds, findings."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.audit import EventFactory, validate
from saw.errors import ConfigError
from saw.patching.apt import AptState, Engine, Installed, Offered, names_of, unlisted_sources, unsigned_sources
from saw.patching.config import DAYS, Hold, Origin, PatchConfig, Window, read_config
from saw.patching.findings import RULES, Breach, Kind, open_store, record
from saw.patching.holds import held_of, refuse_expired
from saw.patching.restart import decide, livepatch_of, need_of
from saw.patching.status import FETCHED, SUCCEEDED, remember, status_of

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)  # a Sunday
DEBIAN = {"origin": "Debian", "codename": "${distro_codename}-security", "label": "Debian-Security"}
UBUNTU = {"origin": "Ubuntu", "archive": "${distro_codename}-security"}
FACTORY = EventFactory("saw-patching", host="host", new_uid=iter(map(str, range(10**6))).__next__)
pytestmark = pytest.mark.control("P0-02")


def config_in(folder: Path, **changes: Any) -> PatchConfig:
    for name in ("lists", "apt/sources.list.d", "boot", "livepatch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "os-release").write_text('ID=debian\nVERSION_CODENAME=trixie\nNAME="Debian GNU/Linux"\n')
    values: dict[str, Any] = {
        "origins": [DEBIAN, UBUNTU],
        "state_dir": str(folder / "state"),
        "lists_dir": str(folder / "lists"),
        "sources_dir": str(folder / "apt"),
        "os_release": str(folder / "os-release"),
        "boot_dir": str(folder / "boot"),
        "reboot_required": str(folder / "reboot-required"),
        "livepatch_dir": str(folder / "livepatch"),
        "workspace": str(folder / "workspace.json"),
        "syslog": "",
    }
    path = folder / "patching.json"
    path.write_text(json.dumps(values | changes))
    return read_config(path)


def origin(**changes: str) -> dict[str, str]:
    told = {"origin": "Debian", "label": "Debian-Security", "codename": "trixie-security", "archive": "stable-security"}
    return {"component": "main", "site": "deb.example", **told, **changes}


def apt(*pending: Offered, held: tuple[str, ...] = (), installed: tuple[str, ...] = (), **engine: Any) -> AptState:
    lines = tuple(Origin(**one).line for one in (DEBIAN, UBUNTU))
    packages = tuple(Installed(name, name, "1", "1", "amd64") for name in installed)
    return AptState(
        packages, pending, held, (), Engine(**({"patterns": lines, "others": (), "reboots": False} | engine)), ()
    )


def offered(package: str, version: str, told: dict[str, str], *, candidate: bool = True) -> Offered:
    return Offered(package, package, "1", "1", version, candidate, (told,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"origins": []}, "length >= 1"),
        ({"origins": [{"origin": "*"}]}, "a pattern for everybody is refused"),
        ({"origins": [{"label": "Debian-Security"}]}, "missing required field `origin`"),
        ({"origins": [{"origin": 'Debian";"origin=Acme'}]}, "matching regex"),
        ({"origins": [{"origin": "Debian,label=x"}]}, "matching regex"),
        ({"holds": [{"package": "a1", "owner": "ann", "reason": "why"}]}, "missing required field `until`"),
        ({"holds": [{"package": "a1", "owner": "   ", "reason": "why", "until": "2026-12-01"}]}, "matching regex"),
        ({"holds": [{"package": "--all", "owner": "ann", "reason": "why", "until": "2026-12-01"}]}, "matching regex"),
        (
            {"holds": [{"package": "a1", "owner": "ann", "reason": "why", "until": "2026-12-01"}] * 2},
            "a1 is held twice",
        ),
        ({"reboot": {"window": {"days": [], "start": "02:00", "minutes": 60}}}, "length >= 1"),
        ({"reboot": {"window": {"days": ["mon"], "start": "24:00", "minutes": 60}}}, "matching regex"),
        ({"reboot": {"window": {"days": ["mon"], "start": "02:00", "minutes": 5}}}, ">= 10"),
        ({"overdue": 1}, "unknown field `overdue`"),
    ],
)
def test_a_wrong_configuration_is_refused_by_field(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    assert config_in(tmp_path).engine
    with pytest.raises(ConfigError) as caught:
        config_in(tmp_path, **change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("system", "told", "taken"),
    [
        ("ID=debian\nVERSION_CODENAME=trixie\n", origin(), True),
        ("ID=debian\nVERSION_CODENAME=trixie\n", origin(label="Debian", codename="trixie"), False),
        ("ID=debian\nVERSION_CODENAME=trixie\n", origin(codename="bookworm-security"), False),
        ("ID=debian\nVERSION_CODENAME=trixie\n", origin(origin="Acme"), False),
        ("ID=ubuntu\nVERSION_CODENAME=noble\n", {"origin": "Ubuntu", "archive": "noble-security"}, True),
        ("ID=ubuntu\nVERSION_CODENAME=noble\n", {"origin": "Ubuntu", "archive": "noble-updates"}, False),
        ("ID=ubuntu\nVERSION_CODENAME=noble\n", {"origin": "LP-PPA-x", "archive": "noble-security"}, False),
    ],
)
def test_the_security_archives_of_debian_and_ubuntu_are_told_from_others(
    tmp_path: Path, system: str, told: dict[str, str], taken: bool
) -> None:
    config = config_in(tmp_path)
    (tmp_path / "os-release").write_text(system)
    names = names_of(config)
    assert any(one.matches(told, names) for one in config.origins) is taken


@pytest.mark.parametrize(
    ("name", "text", "switched"),
    [
        ("a.list", "deb [trusted=yes] http://a.example ./\n", True),
        ("a.list", "deb [arch=amd64 allow-insecure=yes] http://a.example ./\n", True),
        ("a.list", "# deb [trusted=yes] http://a.example ./\n", False),
        ("a.list", "deb [signed-by=/a.asc trusted=no] http://a.example ./\n", False),
        ("a.list", "deb http://a.example stable main # [trusted=yes]\n", False),
        ("a.sources", "Types: deb\nURIs: http://a.example\nTrusted: yes\n", True),
        ("a.sources", "Types: deb\nTrusted: no\n\nTypes: deb\nAllow-Insecure: true\n", True),
        ("a.sources", "Types: deb\nTrusted: yes\nEnabled: no\n", False),
        ("a.sources", "Types: deb\n# Trusted: yes\nURIs: http://a.example\n", False),
        ("a.list.save", "deb [trusted=yes] http://a.example ./\n", False),
    ],
)
def test_a_source_that_is_trusted_without_a_signature_is_found(
    tmp_path: Path, name: str, text: str, switched: bool
) -> None:
    config = config_in(tmp_path)
    (tmp_path / "apt/sources.list.d" / name).write_text(text)
    assert bool(unsigned_sources(config, apt())) is switched
    weak = msgspec.structs.replace(apt(), unverified=("APT::Get::AllowUnauthenticated",))
    assert "apt's setting APT::Get::AllowUnauthenticated is on" in unsigned_sources(config, weak)


def test_the_engine_has_the_sources_of_the_list_in_any_order_of_their_fields_and_no_others(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    same = "label=Debian-Security, codename=${distro_codename}-security,origin=Debian"
    ubuntu = Origin(**UBUNTU).line
    assert unlisted_sources(config, Engine((same, ubuntu), (), reboots=False)) == []
    (more,) = unlisted_sources(config, Engine((same, ubuntu), ("Acme:stable",), reboots=False))
    assert "takes updates from 'Acme:stable'" in more
    (less,) = unlisted_sources(config, Engine((same,), (), reboots=False))
    assert f"does not take updates from '{ubuntu}'" in less
    (restarts,) = unlisted_sources(config, Engine((same, ubuntu), (), reboots=True))
    assert "in no window" in restarts
    off = msgspec.structs.replace(config, engine=False)
    assert unlisted_sources(off, Engine((), (), reboots=False)) == []


@given(
    st.sets(st.sampled_from(DAYS), min_size=1),
    st.times(),
    st.integers(10, 1440),
    st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_a_window_is_open_for_its_minutes_from_its_start_on_its_days(
    days: Any, start: Any, minutes: int, moment: Any
) -> None:
    window = Window(tuple(sorted(days)), f"{start:%H:%M}", minutes)
    begin = window.following(moment)
    assert moment < begin <= moment + timedelta(days=8)
    assert DAYS[begin.weekday()] in days
    assert f"{begin:%H:%M}" == window.start
    assert window.holds(begin)
    assert window.holds(begin + timedelta(minutes=minutes) - timedelta(seconds=1))
    alone = Window((DAYS[begin.weekday()],), window.start, minutes)
    assert not alone.holds(begin - timedelta(seconds=1)) or minutes == 1440
    assert not alone.holds(begin + timedelta(minutes=minutes))


def test_a_newer_kernel_needs_a_restart_and_a_live_patch_makes_it_not_urgent(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    for name in ("6.12.9-amd64", "6.12.10-amd64"):
        (tmp_path / f"boot/vmlinuz-{name}").write_text("")
    kernels = ("6.12.9-amd64", "6.12.10-amd64")
    assert need_of(config, kernels, "6.12.10-amd64").reasons == ()
    assert need_of(config, kernels, "").reasons == (), "a container runs no kernel of its own"
    plain = need_of(config, kernels, "6.12.9-amd64")
    assert plain.reasons == ("the kernel 6.12.9-amd64 runs, and 6.12.10-amd64 is installed",)
    assert (plain.urgent, plain.livepatch) == (True, "none")
    patch = tmp_path / "livepatch/fix_1"
    patch.mkdir()
    (patch / "enabled").write_text("1\n")
    (patch / "transition").write_text("1\n")
    assert livepatch_of(tmp_path / "livepatch") == "in_transition"
    assert need_of(config, kernels, "6.12.9-amd64").urgent, "a patch that is still being applied covers nothing"
    (patch / "transition").write_text("0\n")
    covered = need_of(config, kernels, "6.12.9-amd64")
    assert (covered.urgent, covered.livepatch, bool(covered.reasons)) == (False, "applied", True)
    (patch / "enabled").write_text("0\n")
    assert need_of(config, kernels, "6.12.9-amd64").urgent
    (patch / "enabled").write_text("1\n")
    flag = tmp_path / "reboot-required"
    flag.write_text("")
    flag.with_name("reboot-required.pkgs").write_text("linux-image-amd64\n")
    assert not need_of(config, kernels, "6.12.9-amd64").urgent
    flag.with_name("reboot-required.pkgs").write_text("linux-image-amd64\nlibc6\n")
    assert need_of(config, kernels, "6.12.9-amd64").urgent, "a live patch of the kernel patches no library"


def test_without_a_window_the_host_restarts_only_when_told(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (tmp_path / "reboot-required").write_text("")
    need = need_of(config, (), "")
    assert decide(config, need, NOW, []).refusals == ("there is no reboot window",)
    assert decide(config, need, NOW, [], any_time=True).allowed
    windowed = config_in(tmp_path, reboot={"window": {"days": ["sun"], "start": "11:00", "minutes": 120}})
    assert decide(windowed, need, NOW, []).allowed
    assert not decide(windowed, need, NOW + timedelta(hours=1), []).allowed
    (tmp_path / "reboot-required").unlink()
    assert not decide(windowed, need_of(windowed, (), ""), NOW, []).allowed, "nothing needs it"


def test_a_hold_is_good_to_the_end_of_its_last_day(tmp_path: Path) -> None:
    hold = {"package": "kept", "owner": "ann", "reason": "why", "until": "2026-11-29"}
    config = config_in(tmp_path, holds=[hold])
    refuse_expired(config, date(2026, 11, 29))
    with pytest.raises(ConfigError) as caught:
        refuse_expired(config, date(2026, 11, 30))
    assert "the hold of kept (ann: why) ran out on 2026-11-29" in str(caught.value)
    state = apt(held=("kept", "strange:i386"), installed=("kept",))
    assert [one.state for one in held_of(config, state, date(2026, 11, 29))] == ["held", "unexplained"]
    assert [one.state for one in held_of(config, state, date(2026, 11, 30))] == ["expired", "unexplained"]
    assert [one.state for one in held_of(config, apt(installed=("kept",)), date(2026, 11, 29))] == ["not_held"]
    assert [one.state for one in held_of(config, apt(), date(2026, 11, 29))] == ["absent"]
    assert not Hold("kept", "ann", "why", date(2026, 11, 29)).over(date(2026, 11, 29))


def test_an_update_is_overdue_by_the_age_of_what_is_installed_and_not_of_the_newest_offer(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (tmp_path / "lists/a_Packages").write_text("")
    store = open_store(config)
    first = apt(offered("web", "2", origin()), offered("tool", "2", origin(origin="Acme")))
    status = status_of(config, first, store, NOW - timedelta(days=8), "")
    assert [(one.package, one.listed) for one in status.pending] == [("tool", False), ("web", True)]
    remember(status.pending, store)
    store.notes({FETCHED: NOW.isoformat(), SUCCEEDED: NOW.isoformat()})
    later = apt(offered("web", "3", origin()), offered("web", "2", origin()))
    overdue = status_of(config, later, store, NOW, "")
    assert [(one.kind, one.subject) for one in overdue.breaches] == [("update_overdue", "web")]
    assert overdue.pending[0].offered == "3"
    patched = msgspec.structs.replace(later.pending[0], installed="2")
    fresh = status_of(config, msgspec.structs.replace(later, pending=(patched,)), store, NOW, "")
    assert fresh.breaches == ()
    store.close()


def test_a_security_update_below_what_a_vendor_offers_is_still_named(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    store = open_store(config)
    state = apt(offered("web", "9", origin(origin="Acme")), offered("web", "2", origin(), candidate=False))
    (one,) = status_of(config, state, store, NOW, "").pending
    assert (one.listed, one.offered) == (True, "2")
    store.close()


def test_old_and_missing_lists_are_red_for_nothing_pending_means_nothing_then(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    store = open_store(config)
    store.notes({SUCCEEDED: NOW.isoformat()})
    assert [one.subject for one in status_of(config, apt(), store, NOW, "").breaches] == ["none"]
    (tmp_path / "lists/a_Packages").write_text("")
    store.notes({FETCHED: (NOW - timedelta(days=2)).isoformat()})
    assert status_of(config, apt(), store, NOW, "").breaches == ()
    store.notes({FETCHED: (NOW - timedelta(days=4)).isoformat()})
    (old,) = status_of(config, apt(), store, NOW, "").breaches
    assert (old.kind, "4 days old" in old.words) == ("lists_stale", True)
    store.notes({FETCHED: NOW.isoformat(), SUCCEEDED: (NOW - timedelta(days=4)).isoformat()})
    assert [one.kind for one in status_of(config, apt(), store, NOW, "").breaches] == ["run_failed"]
    store.close()


def test_a_restart_that_waits_too_long_is_red_unless_a_live_patch_covers_it(tmp_path: Path) -> None:
    config = config_in(tmp_path, engine=False)
    (tmp_path / "lists/a_Packages").write_text("")
    kernel = tmp_path / "boot/vmlinuz-2"
    kernel.write_text("")
    store = open_store(config)
    state = msgspec.structs.replace(apt(patterns=()), kernels=("1", "2"))
    then = datetime.fromtimestamp(kernel.stat().st_mtime, UTC)
    store.notes({FETCHED: (then + timedelta(days=15)).isoformat()})
    assert status_of(config, state, store, then + timedelta(days=13), "1").breaches == ()
    (late,) = status_of(config, state, store, then + timedelta(days=15), "1").breaches
    assert late.kind == "reboot_overdue"
    for name, word in (("enabled", "1"), ("transition", "0")):
        (tmp_path / "livepatch/fix").mkdir(exist_ok=True)
        (tmp_path / "livepatch/fix" / name).write_text(word)
    covered = status_of(config, state, store, then + timedelta(days=15), "1")
    assert (covered.breaches, "not urgent" in covered.parts["reboot"]) == ((), True)
    store.close()


@pytest.mark.parametrize("kind", sorted(RULES))
def test_a_broken_rule_is_a_compliance_finding_once_and_again_after_it_held(tmp_path: Path, kind: Kind) -> None:
    config = config_in(tmp_path)
    store = open_store(config)
    breach = (Breach(kind, "a subject\nof two lines", "words", {"since": "x"}),)
    assert len(record(breach, config, store, FACTORY, NOW)) == 1
    assert record(breach, config, store, FACTORY, NOW + timedelta(hours=1)) == []
    assert record((), config, store, FACTORY, NOW + timedelta(hours=2)) == []
    assert len(record(breach, config, store, FACTORY, NOW + timedelta(hours=3))) == 1
    other = Breach("run_failed", "another", "words")
    assert len(record((*breach, other), config, store, FACTORY, NOW + timedelta(hours=4))) == 1, (
        "what stands is told once"
    )
    for one in store.newest(3)[:-1]:
        validate(one.event)
        assert (one.event["class_uid"], one.event["finding_info"]["types"]) == (2003, [kind])
        assert one.event["compliance"]["control"] == RULES[kind][0]
        assert "\n" not in one.event["unmapped"]["saw"]["subject"]
    store.close()
