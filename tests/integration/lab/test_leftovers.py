"""Clean-up of hosts that a killed run left: ended with their network, wherever the pieces are; another checkout's stay."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from saw.lab.leftovers import Ended, Site, end_all, foreign, measurements, running
from saw.lab.nspawn import LabError, LabNetwork, LightHost
from saw.lab.process import gone, recall

ROOT = Path(__file__).resolve().parents[3]
TARS = sorted((ROOT / "build/cache").glob("base-host-*.tar"), key=lambda path: path.stat().st_mtime)
boots = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to boot a host"),
    pytest.mark.skipif(not TARS, reason="no base tree in build/cache: run `make workspace` once"),
]


@pytest.fixture(scope="module")
def site() -> Site:
    number = os.getpid() % 100000
    lan = LabNetwork(f"sawl{number}", f"10.95.{number % 250}")
    return Site("the test", "site", lan, ("one",))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkout") / "build"


@pytest.fixture(scope="module")
def tree(build: Path, site: Site) -> Iterator[LightHost]:
    """A host of a build directory; the tests share its tree."""
    made = LightHost("one", f"{site.network.prefix}.10", build / "site", site.network)
    try:
        yield made
    finally:
        made.down(purge=True)
        site.network.down()


@pytest.fixture
def host(tree: LightHost) -> LightHost:
    """That host, running."""
    tree.up(TARS[-1], patience=90)
    return tree


def processes(site: Site) -> list[int]:
    return [process.pid for process in running() if process.namespace == site.network.namespace]


def end(build: Path, site: Site, said: list[str], *, purge: bool = True) -> Ended:
    return end_all(build, build.parent, said.append, purge=purge, sites=(site,))


class TestHosts:
    """One host, in this order: seen by another checkout, ended, booted again and ended without its nspawn."""

    pytestmark = boots

    def test_hosts_of_another_checkout_are_named_and_stay(
        self, host: LightHost, site: Site, build: Path, tmp_path: Path
    ) -> None:
        said: list[str] = []
        ended = end(tmp_path / "other", site, said)
        assert (ended.hosts, ended.networks, ended.left_alone) == (0, 0, 1)
        assert said == [f"left alone: the test of {build} (1 hosts); end it there"]
        assert host.running()
        assert host.answers()
        assert site.network.complete()

    @pytest.mark.parametrize("orphan", [False, True], ids=["running", "its nspawn was killed"])
    def test_hosts_of_this_build_directory_are_ended_and_counted(
        self, host: LightHost, site: Site, build: Path, orphan: bool
    ) -> None:
        said: list[str] = []
        if orphan:
            pid = recall(host.pid_file)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert gone(pid, 10)
        assert processes(site)
        ended = end(build, site, said, purge=orphan)
        assert (ended.hosts, ended.networks, ended.left_alone) == (1, 1, 0)
        assert said[0].startswith("ended host one of the test (")
        assert processes(site) == []
        assert host.directory.exists() is not orphan
        assert not site.network.exists()
        assert end(build, site, []) == Ended()


def machine(proc: Path, *hosts: tuple[str, str, str]) -> Path:
    """A /proc with one nspawn process for each (control group, program, root)."""
    for number, (group, program, root) in enumerate(hosts, 100):
        entry = proc / str(number)
        entry.mkdir(parents=True)
        (entry / "cgroup").write_text(f"4:memory:/\n0::{group}\n")
        (entry / "cmdline").write_bytes(b"\0".join([program.encode(), b"--quiet", f"--directory={root}".encode(), b""]))
    return proc


def test_a_host_is_known_by_its_control_group_and_its_tree_by_its_nspawn(tmp_path: Path) -> None:
    proc = machine(
        tmp_path / "proc",
        ("/saw-sawlab-control", "/usr/bin/systemd-nspawn", "/a/build/lab/hosts/control/root"),
        ("/saw-sawmol-edge/payload", "/usr/bin/systemd-nspawn", "/b/build/molecule/hosts/edge/root"),
        ("/saw-sawlab-control/payload/init.scope", "/sbin/init", "/c"),
        ("/user.slice", "/usr/bin/systemd-nspawn", "/d/build/lab/hosts/control/root"),
        ("/saw-sawlab-control (deleted)", "/sbin/init", "/e"),
    )
    (tmp_path / "proc/104/cmdline").write_bytes(b"")  # it has ended, and its parent has not asked yet
    found = list(running(proc))
    assert [(process.namespace, process.host, str(process.root)) for process in found] == [
        ("sawlab", "control", "/a/build/lab/hosts/control/root"),
        ("sawmol", "edge", "/b/build/molecule/hosts/edge/root"),
        ("sawlab", "control", "None"),
    ]
    assert foreign(found, "sawlab", Path("/a/build")) == []
    assert foreign(found, "sawlab", Path("/a/build-2")) == [Path("/a/build/lab/hosts/control/root")]


def test_hosts_of_two_checkouts_in_one_namespace_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tmp_path / "build"
    proc = machine(
        tmp_path / "proc",
        ("/saw-sawt-one", "systemd-nspawn", str(build / "site/hosts/one/root")),
        ("/saw-sawt-two", "systemd-nspawn", "/other/build/site/hosts/two/root"),
    )
    monkeypatch.setattr("saw.lab.leftovers.running", lambda: running(proc))
    mixed = Site("the test", "site", LabNetwork("sawt", "10.95.0"), ("one",))
    with pytest.raises(LabError, match="share the namespace sawt") as refused:
        end(build, mixed, [])
    assert refused.value.cure.startswith("end the test of /other/build first")


# --- scripts/clean.sh ------------------------------------------------------------------------------------------------


def checkout(tmp_path: Path, *, saw: str | None) -> Path:
    """A tree with the script, state to remove, and ``saw`` (a shell text) in its virtual environment."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts/clean.sh").write_bytes((ROOT / "scripts/clean.sh").read_bytes())
    (root / "build/lab/hosts/control").mkdir(parents=True)
    (root / "scripts/bootstrap.sh").write_text("#!/bin/sh\necho no index >&2; exit 1\n")
    (root / "scripts/bootstrap.sh").chmod(0o755)
    if saw is not None:
        (root / ".venv/bin").mkdir(parents=True)
        for name, text in (("saw", saw), ("python", "exit 0")):
            (root / ".venv/bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (root / ".venv/bin" / name).chmod(0o755)
    return root


def clean(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / "scripts/clean.sh")],
        capture_output=True, text=True, check=False, timeout=60, env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip


def test_clean_says_what_it_removes_and_how_much(tmp_path: Path) -> None:
    root = checkout(tmp_path, saw='echo "lab down: $SAW_BUILD"')
    done = clean(root)
    assert done.returncode == 0, done.stderr
    assert f"lab down: {root}/build" in done.stdout
    assert f"removed {root}/build (" in done.stdout
    assert done.stdout.endswith("==> clean: 2 things removed\n")
    assert not (root / "build").exists()
    assert not (root / ".venv").exists()
    again = clean(root)
    assert again.stdout.splitlines()[-1] == "==> clean: 0 things removed"


@pytest.mark.parametrize("saw", [None, "exit 1"], ids=["no virtual environment", "hosts that do not end"])
def test_nothing_is_removed_under_hosts_that_may_run(tmp_path: Path, saw: str | None) -> None:
    root = checkout(tmp_path, saw=saw)
    done = clean(root)
    assert done.returncode == 1
    assert "nothing was removed" in done.stderr
    assert (root / "build/lab/hosts/control").is_dir()


def test_another_build_directory_loses_only_what_is_ours(tmp_path: Path) -> None:
    root, other = checkout(tmp_path, saw="exit 0"), tmp_path / "large disk"
    for name in ("images", "cache", "somebody's data"):
        (other / name).mkdir(parents=True)
    done = clean(root, SAW_BUILD=str(other))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in other.iterdir()] == ["somebody's data"]
    assert "it holds more than ours" in done.stdout


def test_clean_removes_every_tree_that_npm_filled(tmp_path: Path) -> None:
    root = checkout(tmp_path, saw="exit 0")
    folders = re.findall(r"^ *npm_tree (\S+) ", (ROOT / "scripts/bootstrap.sh").read_text(), re.MULTILINE)
    assert len(folders) > 2
    for folder in folders:
        (root / folder / "node_modules/a").mkdir(parents=True)
    done = clean(root)
    assert done.returncode == 0, done.stderr
    assert list(root.rglob("node_modules")) == []
    assert all((root / folder).is_dir() for folder in folders), "what is not npm's stays"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as the lab does")
def test_measurements_that_were_killed_are_found_by_their_folder_and_removed_with_their_state(tmp_path: Path) -> None:
    for name in ("site-70123-x1_y", "site-notes", "site-1", "sites-1-x"):
        (tmp_path / name / "lab/hosts").mkdir(parents=True)
    [found] = measurements(tmp_path)
    assert (found.folder, found.network.namespace) == ("site-70123-x1_y/lab", "saws70123")
    none = Site("the test", "none", LabNetwork(f"sawl{os.getpid() % 100000}", "10.95.251"), ())
    end(tmp_path, none, [], purge=False)
    assert measurements(tmp_path) == [found]
    end(tmp_path, none, [])
    assert measurements(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {"site-notes", "site-1", "sites-1-x"}
