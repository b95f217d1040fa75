"""Inputs, package lists, reuse and disk assembly of the golden image."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from image_rig import Archive, finished, install, package_set, small_repository

from saw.errors import SawError
from saw.image import build as image_build
from saw.image import disk
from saw.image import inputs as image_inputs
from saw.image.base import archive_of, base_tar, machine_mirrors, read_packages, set_of
from saw.image.base_os import base_os, variable_file
from saw.image.build import ImageBuild
from saw.image.disk import MIB, ImageError, assemble, free_space_needed, lay_out
from saw.image.package_state import Base
from saw.image.wheelhouse import for_python, third_party
from saw.lab.exclusive import exclusive

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))
from private_ns import private

ROOT = Path(__file__).resolve().parents[3]
ROOT_ID = "7b0b9c1e-5a0e-5d3c-9d1c-6f9a4c1f2b3d"
DISK_ID = "0f7f0c52-2f3c-5d34-8a9e-8d0d3a7c1b2e"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with a file under some of the roots."""
    root = small_repository(tmp_path / "repository")
    for name in ("packer/a.txt", "src/saw/policy.py", "src/saw/lab/up.py", "roles/egress/README.md", "uv.lock"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


# --- inputs --------------------------------------------------------------------------------------------------------------


def test_the_digest_follows_content_and_names(repository: Path) -> None:
    first = image_inputs.collect(repository)
    assert image_inputs.collect(repository) == first
    (repository / "packer/a.txt").write_text("other")
    second = image_inputs.collect(repository)
    assert second.digest != first.digest
    assert second.changed_since(first) == ["packer/a.txt"]
    (repository / "packer/a.txt").rename(repository / "packer/b.txt")
    third = image_inputs.collect(repository)
    assert third.digest != second.digest
    assert third.changed_since(second) == ["packer/a.txt", "packer/b.txt"]
    assert third.changed_since(third) == []


@pytest.mark.parametrize(
    "name", ["src/saw/__pycache__/policy.pyc", "src/saw/lab/up.py", "src/saw/vm/qemu.py", "roles/egress/README.md"]
)
def test_what_the_image_does_not_hold_does_not_count(repository: Path, name: str) -> None:
    first = image_inputs.collect(repository)
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something else")
    assert image_inputs.collect(repository).digest == first.digest


def test_every_root_of_the_real_repository_is_there() -> None:
    missing = [root for root in image_inputs.ROOTS if not (ROOT / root).exists()]
    assert missing == []


# --- packages and mirrors --------------------------------------------------------------------------------------------------


def test_a_package_list_is_read_without_comments_sorted_and_once(tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("# all\nzsh # the shell\n\ncurl\nzsh\n  git  \n")
    assert read_packages(listing) == ["curl", "git", "zsh"]


def test_the_mirrors_are_those_of_this_machine() -> None:
    try:
        mirrors = machine_mirrors()
    except ImageError as error:
        assert "apt-get" in error.message + error.cure
        pytest.skip(f"no Debian apt here: {error}")
    assert re.match(r"(https?|file|mirror)[:+]", mirrors.archive)
    assert not mirrors.archive.endswith("/")


def test_a_machine_without_a_debian_archive_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho 'Packages|Other|http://archive.example/other'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ImageError, match="knows no Debian archive") as refused:
        machine_mirrors()
    assert refused.value.cure == "run apt-get update with a Debian mirror in sources.list"
    fake.write_text(
        "#!/bin/sh\necho 'Packages|Debian|http://archive.example/debian/'\necho 'Sources|Debian|http://x.example'\n"
    )
    mirrors = machine_mirrors()
    assert (mirrors.archive, mirrors.security) == ("http://archive.example/debian", None)


def tree(path: Path, packages: dict[str, str]) -> Path:
    """A tar with a dpkg database."""
    status = "\n".join(
        f"Package: {name}\nStatus: install ok installed\nVersion: {version}\n" for name, version in packages.items()
    )
    with tarfile.open(path, "w") as stream:
        member = tarfile.TarInfo("./var/lib/dpkg/status")
        member.size = len(status)
        stream.addfile(member, io.BytesIO(status.encode()))
    return path


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in place of apt-get and mmdebstrap: the tree is ``tree.tar``, and it fails while ``fail`` is there."""
    tools = tmp_path / "tools"
    tools.mkdir()
    apt, made = tools / "apt-get", tools / "mmdebstrap"
    apt.write_text("#!/bin/sh\necho 'Packages|Debian|http://archive.example/debian/'\n")
    made.write_text(
        '#!/bin/sh\nfor word in "$@"; do\n'
        f'  case "$word" in *.partial) cp {tmp_path}/tree.tar "$word";;\n'
        f'    */sources.list) cp "${{word%/*}}/pins" {tmp_path}/pins;; esac\n'
        f"done\n[ -e {tmp_path}/fail ] && {{ echo 'E: no such package' >&2; exit 100; }}; exit 0\n"
    )
    apt.chmod(0o755)
    made.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path


def test_a_failed_bootstrap_leaves_nothing_that_looks_finished(bootstrap: Path) -> None:
    listing, cache = bootstrap / "host.txt", bootstrap / "cache"
    listing.write_text("curl\n")
    packages = package_set({"curl": "8.1-1", "bash": "5.2-1"})
    tree(bootstrap / "tree.tar", packages.packages)
    (bootstrap / "fail").touch()
    with pytest.raises(ImageError, match="mmdebstrap failed: E: no such package") as refused:
        base_tar(listing, cache, base_os(ROOT), packages)
    assert "check the mirror and the free disk space" in refused.value.cure
    assert [path.suffix for path in cache.iterdir()] == [".log"]
    (bootstrap / "fail").unlink()
    made = base_tar(listing, cache, base_os(ROOT), packages)
    assert sorted(path.name for path in cache.iterdir()) == sorted([made.name, f"{made.name}.log", set_of(made).name])
    (bootstrap / "tools/mmdebstrap").unlink()
    assert base_tar(listing, cache, base_os(ROOT), packages) == made


def test_the_installer_is_held_to_the_package_set_and_its_work_is_compared_with_it(bootstrap: Path) -> None:
    listing, cache = bootstrap / "host.txt", bootstrap / "cache"
    listing.write_text("curl\n")
    packages = package_set({"curl": "1:8.1-1", "bash": "5.2-1"})
    for others in ({"curl": "1:8.1-2", "bash": "5.2-1"}, {"curl": "1:8.1-1"}, {**packages.packages, "dash": "1"}):
        tree(bootstrap / "tree.tar", others)
        with pytest.raises(ImageError, match="has other packages than it should"):
            base_tar(listing, cache, base_os(ROOT), packages)
        assert [path.suffix for path in cache.iterdir()] == [".log"]
    tree(bootstrap / "tree.tar", packages.packages)
    base_tar(listing, cache, base_os(ROOT), packages)
    pins = (bootstrap / "pins").read_text()
    assert pins.startswith("Package: *\nPin: release *\nPin-Priority: -1\n")
    assert "Package: curl\nPin: version 1:8.1-1\nPin-Priority: 1001\n" in pins


def test_the_cache_keeps_the_newest_tree_of_a_kind_and_the_one_before(bootstrap: Path) -> None:
    listing, cache = bootstrap / "host.txt", bootstrap / "cache"
    listing.write_text("curl\n")
    made = []
    for number in range(4):
        packages = package_set({"curl": f"8.{number}"})
        tree(bootstrap / "tree.tar", packages.packages)
        made.append(base_tar(listing, cache, base_os(ROOT), packages))
        os.utime(made[-1], (number, number))
    assert sorted(cache.glob("*.tar")) == sorted(made[2:])
    assert len(list(cache.iterdir())) == 6


def test_the_tar_of_the_hosts_is_made_by_one_and_taken_by_others(
    bootstrap: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(Archive(), monkeypatch)
    tree(bootstrap / "tree.tar", package_set().packages)
    repository = small_repository(bootstrap / "repository")
    (repository / "packer/packages/host.txt").write_text("openssl\n")
    options = ["host-tar", "--repository", str(repository), "--build", str(bootstrap / "build")]
    command = [sys.executable, "-m", "saw.image.build", *options]
    with exclusive(bootstrap / "build"):
        other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert other.stderr is not None
        assert "waiting for another run" in other.stderr.readline()
        base = Base(repository / "packer/packages/host.txt", bootstrap / "build/cache", base_os(repository))
        base.cache.mkdir(parents=True)
        made = base.tar(package_set())
        assert image_build.main(options) == 0, "a tar that is there needs no lock"
        assert capsys.readouterr().out == f"{made}\n"
    assert other.communicate(timeout=240)[0] == f"{made}\n"


# --- base systems ------------------------------------------------------------------------------------------------------


GOOD_OS = 'suite = "s"\nkeyring = "/k"\n# words\n\npackages = "p.txt"\npython_interpreter  =  "/usr/bin/python3"\n'


def base_system(tmp_path: Path, text: str) -> Path:
    """A repository with the base system ``mine``."""
    path = variable_file(tmp_path, "mine")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return tmp_path


def test_a_base_system_is_read_from_its_packer_variables(tmp_path: Path) -> None:
    found = base_os(base_system(tmp_path, GOOD_OS), "mine")
    assert (found.suite, found.keyring, found.packages, found.python_interpreter) == (
        "s", "/k", "p.txt", "/usr/bin/python3",
    )  # fmt: skip
    debian = base_os(ROOT)
    assert debian.suite == "trixie"


SYSTEMS = sorted(path.name.removesuffix(".pkrvars.hcl") for path in (ROOT / "packer/pkrvars").iterdir())


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_base_system_has_packages_and_its_own_variables(name: str) -> None:
    found = base_os(ROOT, name)
    packages = read_packages(ROOT / "packer" / found.packages)
    assert {"systemd", "openssh-server", "tpm2-tools"} <= set(packages)
    assert any(one.startswith(("linux-image-", "kernel")) for one in packages)
    assert Path(found.keyring).is_absolute()
    suites = {"debian-13": "trixie", "ubuntu-24.04": "noble", "rhel-9": "9"}
    assert {one: base_os(ROOT, one).suite for one in SYSTEMS} == suites


def test_ubuntu_has_its_security_updates_in_the_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "apt-get"
    fake.write_text("#!/bin/sh\necho 'Packages|Ubuntu|http://archive.example/ubuntu/'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    signed = "deb [signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg] http://archive.example/ubuntu"
    assert archive_of(base_os(ROOT, "ubuntu-24.04")).sources == tuple(
        f"{signed} {suite} main universe" for suite in ("noble", "noble-updates", "noble-security")
    )
    with pytest.raises(ImageError, match="knows no Debian archive"):
        archive_of(base_os(ROOT))


def test_an_image_of_the_rhel_family_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["image", "--repository", str(ROOT), "--build", str(tmp_path / "build"), "--base-os", "rhel-9"]
    assert image_build.main(options) == 1
    assert "no base tree of the family redhat is made here" in capsys.readouterr().err
    assert not (tmp_path / "build/images").exists()


def test_another_base_system_is_another_kind_of_image(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ImageBuild(repository, tmp_path / "build", lambda _: None)
    archive = install(Archive(), monkeypatch)
    text = variable_file(repository).read_text()
    variable_file(repository, "mine").write_text(text.replace("trixie", "mine"))
    ours = build.ensure()[0]
    other = replace(build, system="mine")
    assert other.options == {"system": "mine"}
    assert other.latest() is None
    assert other.base.system.suite == "mine"
    made = other.ensure()[0]
    assert (made.name != ours.name, len(archive.made)) == (True, 2)
    latest = build.latest()
    assert latest is not None
    assert latest[0].name == ours.name


def test_the_source_is_no_input_of_an_image(repository: Path, tmp_path: Path) -> None:
    build = ImageBuild(repository, tmp_path / "build")
    assert replace(build, source="qemu").sources() == build.sources()


def test_wheels_for_another_python_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(*argv: str, env: dict[str, str] | None = None) -> str:
        if "export" not in argv:
            asked.append(argv[argv.index("--python-version") + 1])
        return "a==1 --hash=sha256:" + "0" * 64

    monkeypatch.setattr("saw.image.wheelhouse.run", run)
    assert third_party(tmp_path, tmp_path) != third_party(tmp_path, tmp_path, python="3.12")
    assert asked == ["3.13", "3.12"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD_OS + 'suite = "t"\n', ":7 is not one new line"),
        (GOOD_OS.replace('"s"', '"${var.x}"'), ":1 is not one new line"),
        (GOOD_OS.replace('"s"', '"a\\"b"'), ":1 is not one new line"),
        (GOOD_OS.replace('"s"', "[1]"), ":1 is not one new line"),
        (GOOD_OS + 'other = "x"\n', "unknown field `other`"),
        (GOOD_OS.replace("packages", "package_list"), "package"),
    ],
)
def test_a_base_system_that_two_readers_could_read_differently_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ImageError, match=re.escape(words)):
        base_os(base_system(tmp_path, text), "mine")


def test_an_unknown_base_system_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no base system other") as refused:
        base_os(base_system(tmp_path, GOOD_OS), "other")
    assert refused.value.cure == "take one of: mine"


@pytest.mark.parametrize(
    ("name", "source"), [*((name, "null.tree") for name in SYSTEMS), ("debian-13", "qemu.machine"), ("", "null.tree")]
)
def test_packer_takes_what_depends_on_the_base_system_from_its_file(tmp_path: Path, name: str, source: str) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    names = (
        "ssh_host", "known_hosts_file", "root_tree", "output", "seed", "wheelhouse", "mcp_servers", "python", "edr_variables",
    )  # fmt: skip
    values = {
        **dict.fromkeys(names, "x"),
        "ssh_key_file": key,
        "ansible_playbook": Path(sys.executable).with_name("ansible-playbook"),
    }
    options = [f"-only=workspace.{source}", *([f"-var-file={variable_file(ROOT, name)}"] if name else [])]
    options += [option for name, value in values.items() for option in ("-var", f"{name}={value}")]
    done = subprocess.run(
        ["packer", "validate", *options, "packer"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "CHECKPOINT_DISABLE": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) is bool(name), done.stdout + done.stderr
    assert name or "Unset variable" in done.stdout + done.stderr


# --- reuse -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(repository: Path, tmp_path: Path) -> ImageBuild:
    return ImageBuild(repository, tmp_path / "build", lambda _: None)


def test_an_unfinished_build_is_not_an_image(build: ImageBuild) -> None:
    assert build.latest() is None
    image = finished(build, image_inputs.collect(build.repository))
    newest = build.latest()
    assert newest is not None
    assert newest[0] == image
    for name in ("build.json", "inputs.json", "image.qcow2"):
        path = Path(image.directory, name)
        content = path.read_bytes()
        path.unlink()
        assert build.latest() is None
        path.write_bytes(content)
    Path(image.directory, "build.json").write_text("{")
    assert build.latest() is None


def test_the_newest_of_several_counts(build: ImageBuild) -> None:
    inputs = image_inputs.collect(build.repository)
    finished(build, image_inputs.Inputs("1" * 64, {}), "2026-01-01T00:00:00+00:00")
    new = finished(build, inputs, "2026-01-02T00:00:00+00:00")
    newest = build.latest()
    assert newest is not None
    assert newest[0] == new


def test_equal_inputs_reuse_the_image_and_say_so(build: ImageBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = install(Archive(), monkeypatch)
    image = finished(build, build.sources(), packages=package_set())
    found, reason = build.ensure()
    assert found == image
    assert reason.startswith(
        f"reused: the inputs have not changed (digest {image.inputs_digest[:12]}); packages as of "
    )
    assert archive.asked == 1


def test_changed_inputs_rebuild_and_name_the_files(build: ImageBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    archive = install(Archive(), monkeypatch)
    build = ImageBuild(build.repository, build.build, said.append)
    assert build.ensure()[1] == "built: there is no finished image yet"
    (build.repository / "packer/a.txt").write_text("new")
    assert build.ensure()[1] == "rebuilt: packer/a.txt changed"
    for number in range(6):
        (build.repository / f"packer/{number}.txt").write_text("new")
    reason = build.ensure()[1]
    assert reason == "rebuilt: " + ", ".join(f"packer/{number}.txt" for number in range(5)) + " and 1 more changed"
    assert said[-1].startswith(f"golden image will be {reason}; packages as of ")
    assert len(archive.made) == 3
    assert build.ensure()[1].startswith("reused")


def test_the_command_line_answers_json_and_refuses_with_exit_code_1(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = install(Archive(), monkeypatch)
    build = ImageBuild(repository, tmp_path / "build")
    finished(build, build.sources(), packages=package_set())
    options = ["image", "--repository", str(repository), "--build", str(tmp_path / "build"), "--json"]
    assert image_build.main(options) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"]
    assert not answer["changed"]
    assert answer["image"].endswith("image.qcow2")
    assert answer["packages"]["asked"] == "2026-01-01T00:00:00+00:00"
    archive.away = "no route to it"
    assert image_build.main([*options, "--packages", "fresh"]) == 1
    assert "no route to it" in capsys.readouterr().err
    assert image_build.main([*options, "--packages", "newest"]) == 1
    assert "packages of an image are not chosen by 'newest'" in capsys.readouterr().err
    assert (
        image_build.main(["assemble", "--root", str(tmp_path), "--output", str(tmp_path / "x/y"), "--seed", "s"]) == 1
    )
    assert "expected one kernel" in capsys.readouterr().err


# --- disk ----------------------------------------------------------------------------------------------------------------


def test_a_tree_without_a_kernel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "root/boot").mkdir(parents=True)
    output = tmp_path / "out/image.qcow2"
    with pytest.raises(ImageError, match="expected one kernel") as refused:
        assemble(tmp_path / "root", output, seed="seed")
    assert refused.value.cure == "clean the image tree"
    assert list(output.parent.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a private mount namespace")
def test_a_tree_whose_boot_image_cannot_be_built_leaves_neither_file_nor_mount(tmp_path: Path) -> None:
    for name in ("boot", "etc", "proc", "tmp"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root/etc/machine-id").touch()
    (tmp_path / "root/boot/vmlinuz-6.12.1").write_bytes(b"kernel")
    output = tmp_path / "out/image.qcow2"
    with pytest.raises(ImageError, match="`unshare` failed"):
        assemble(tmp_path / "root", output, seed="seed")
    assert list(output.parent.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_the_layout_is_read_back_as_it_was_asked_for(tmp_path: Path) -> None:
    esp, ext4, raw = tmp_path / "esp", tmp_path / "ext4", tmp_path / "raw"
    esp.write_bytes(b"E" * (2 * MIB))
    ext4.write_bytes(b"R" * (3 * MIB))
    lay_out(raw, esp, ext4, DISK_ID, ROOT_ID)
    shown = subprocess.run(["sfdisk", "--json", str(raw)], capture_output=True, check=True).stdout
    table = json.loads(shown)["partitiontable"]
    assert (table["label"], table["id"].lower()) == ("gpt", DISK_ID)
    first, second = table["partitions"]
    assert (first["start"] * 512, first["size"] * 512, first["type"], first["name"]) == (
        MIB,
        2 * MIB,
        disk.ESP_TYPE,
        "esp",
    )
    assert (second["start"] * 512, second["size"] * 512, second["type"], second["uuid"].lower()) == (
        3 * MIB,
        3 * MIB,
        disk.ROOT_TYPE,
        ROOT_ID,
    )
    content = raw.read_bytes()
    assert content[MIB : 3 * MIB] == b"E" * (2 * MIB)
    assert content[3 * MIB : 6 * MIB] == b"R" * (3 * MIB)


def test_a_partition_table_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for name in ("esp", "ext4"):
        (tmp_path / name).write_bytes(b"x" * MIB)
    with pytest.raises(ImageError, match="sfdisk failed"):
        lay_out(tmp_path / "raw", tmp_path / "esp", tmp_path / "ext4", "no-uuid", "no-uuid")


def space(path: Path, need: int) -> str:
    try:
        free_space_needed(path, need)
    except SawError as error:
        return str(error)
    return ""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a private mount namespace")
def test_a_full_disk_is_named_with_need_and_cure(tmp_path: Path) -> None:
    small = {str(tmp_path): "8m"}
    assert private(lambda: space(tmp_path, 4 * MIB), tmpfs=small) == ""
    text = private(lambda: space(tmp_path, 64 * MIB), tmpfs=small)
    assert text == (
        f"{tmp_path} has 8 MiB free, 64 MiB are needed "
        "(free disk space there, or set SAW_BUILD to a directory on a larger disk)"
    )


# --- wheelhouse ----------------------------------------------------------------------------------------------------------


def test_every_wheel_of_a_made_wheelhouse_is_named_by_its_hash() -> None:
    made = sorted((ROOT / "build/cache").glob("wheelhouse-*/requirements.txt"), key=lambda path: path.stat().st_mtime)
    if not made:
        pytest.skip("no wheelhouse was made on this machine yet")
    listing = made[-1].read_text(encoding="utf-8").replace("\\\n", " ")
    requirements = [line for line in listing.splitlines() if line.strip()]
    assert all("==" in line and re.search(r"--hash=sha256:[0-9a-f]{64}", line) for line in requirements)
    own = next(line for line in requirements if line.startswith("secure-agent-workspace=="))
    allowed = set(re.findall(r"sha256:([0-9a-f]{64})", listing))
    wheel = next(made[-1].parent.glob("secure_agent_workspace-*.whl"))
    assert disk.digest_of(wheel) in own
    for path in made[-1].parent.glob("*.whl"):
        assert disk.digest_of(path) in allowed, path.name


def test_a_wheelhouse_has_what_is_for_the_hosts_python_and_not_for_the_controllers() -> None:
    listing = (
        "a==1 ; python_full_version < '3.12' \\\n    --hash=sha256:aa\n"
        "a==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:bb\n"
        "b==3 ; platform_python_implementation != 'PyPy' \\\n    --hash=sha256:cc\n"
    )
    assert for_python(listing, "3.13") == (
        "a==2 \\\n    --hash=sha256:bb\nb==3 ; platform_python_implementation != 'PyPy' \\\n    --hash=sha256:cc\n"
    )
    assert for_python(listing, "3.11").startswith("a==1 \\\n    --hash=sha256:aa\nb==3")


def test_equal_locks_take_the_downloaded_wheels_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []

    def run(*argv: str, env: dict[str, str] | None = None) -> str:
        if "export" in argv:
            return lock
        downloads.append(argv[0])
        assert "--require-hashes" in argv
        assert "--only-binary=:all:" in argv
        return ""

    monkeypatch.setattr("saw.image.wheelhouse.run", run)
    lock = "a==1 --hash=sha256:" + "0" * 64
    first = third_party(tmp_path, tmp_path)
    assert third_party(tmp_path, tmp_path) == first
    assert len(downloads) == 1
    lock = "a==2 --hash=sha256:" + "1" * 64
    assert third_party(tmp_path, tmp_path) != first
    assert (first / "requirements.txt").read_text() != lock
