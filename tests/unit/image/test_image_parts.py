"""Inputs, package lists, reuse and disk assembly of the golden image."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from saw.errors import SawError
from saw.image import build as image_build
from saw.image import disk
from saw.image import inputs as image_inputs
from saw.image.base import base_tar, machine_mirrors, read_packages
from saw.image.base_os import base_os, variable_file
from saw.image.build import GoldenImage, ImageBuild
from saw.image.disk import MIB, ImageError, assemble, free_space_needed, lay_out
from saw.image.wheelhouse import for_python, third_party

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))
from private_ns import private

ROOT = Path(__file__).resolve().parents[3]
ROOT_ID = "7b0b9c1e-5a0e-5d3c-9d1c-6f9a4c1f2b3d"
DISK_ID = "0f7f0c52-2f3c-5d34-8a9e-8d0d3a7c1b2e"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with a file under some of the roots."""
    root = tmp_path / "repository"
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


def test_a_failed_bootstrap_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "host.txt"
    listing.write_text("curl\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    apt, bootstrap = tools / "apt-get", tools / "mmdebstrap"
    apt.write_text("#!/bin/sh\necho 'Packages|Debian|http://archive.example/debian/'\n")
    bootstrap.write_text(
        '#!/bin/sh\nfor word in "$@"; do case "$word" in *.partial) echo tree > "$word";; esac; done\n'
        "[ -e \"$FAIL\" ] && { echo 'E: no such package' >&2; exit 100; }; exit 0\n"
    )
    apt.chmod(0o755)
    bootstrap.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAIL", str(listing))
    cache = tmp_path / "cache"
    with pytest.raises(ImageError, match="mmdebstrap failed: E: no such package") as refused:
        base_tar(listing, cache, base_os(ROOT))
    assert "check the mirror and the free disk space" in refused.value.cure
    assert [path.suffix for path in cache.iterdir()] == [".log"]
    monkeypatch.setenv("FAIL", "/nonexistent")
    made = base_tar(listing, cache, base_os(ROOT))
    assert made.read_text() == "tree\n"
    assert sorted(path.name for path in cache.iterdir()) == [made.name, f"{made.name}.log"]
    bootstrap.unlink()
    assert base_tar(listing, cache, base_os(ROOT)) == made


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
    assert (ROOT / "packer" / debian.packages).is_file()


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


@pytest.mark.parametrize("with_file", [True, False], ids=["with its file", "without"])
def test_packer_takes_what_depends_on_the_base_system_from_its_file(tmp_path: Path, with_file: bool) -> None:
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
    options = [f"-var-file={variable_file(ROOT)}"] if with_file else []
    options += [option for name, value in values.items() for option in ("-var", f"{name}={value}")]
    done = subprocess.run(
        ["packer", "validate", *options, "packer"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "CHECKPOINT_DISABLE": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) is with_file, done.stdout + done.stderr
    assert with_file or "Unset variable" in done.stdout + done.stderr


# --- reuse -------------------------------------------------------------------------------------------------------------


def finished(build: ImageBuild, inputs: image_inputs.Inputs, created: str = "2026-01-01T00:00:00+00:00") -> GoldenImage:
    """Write what a finished build leaves."""
    target = build.images / f"workspace-{inputs.digest[:12]}"
    target.mkdir(parents=True)
    (target / "image.qcow2").write_bytes(b"disk")
    image = GoldenImage(
        target.name, str(target), str(target / "image.qcow2"), "0" * 64, inputs.digest, created, 1.0, "6.12.1"
    )
    (target / "inputs.json").write_bytes(msgspec.json.encode(inputs))
    (target / "build.json").write_bytes(msgspec.json.encode(image))
    return image


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


def test_equal_inputs_reuse_the_image_and_say_so(build: ImageBuild) -> None:
    image = finished(build, image_inputs.collect(build.repository))
    found, reason = build.ensure()
    assert found == image
    assert reason == f"reused: the inputs have not changed (digest {image.inputs_digest[:12]})"


def test_changed_inputs_rebuild_and_name_the_files(build: ImageBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[image_inputs.Inputs] = []
    said: list[str] = []

    def make(self: ImageBuild, inputs: image_inputs.Inputs) -> GoldenImage:
        made.append(inputs)
        return finished(self, inputs, f"2026-02-01T00:00:0{len(made)}+00:00")

    monkeypatch.setattr(ImageBuild, "make", make)
    build = ImageBuild(build.repository, build.build, said.append)
    assert build.ensure()[1] == "built: there is no finished image yet"
    (build.repository / "packer/a.txt").write_text("new")
    assert build.ensure()[1] == "rebuilt: packer/a.txt changed"
    for number in range(6):
        (build.repository / f"packer/{number}.txt").write_text("new")
    reason = build.ensure()[1]
    assert reason == "rebuilt: " + ", ".join(f"packer/{number}.txt" for number in range(5)) + " and 1 more changed"
    assert said[-1] == f"golden image will be {reason}"
    assert len(made) == 3
    assert build.ensure()[1].startswith("reused")


def test_old_images_and_interrupted_builds_are_thrown_away(build: ImageBuild) -> None:
    images = []
    for number in range(4):
        images.append(finished(build, image_inputs.Inputs(str(number) * 64, {}), f"2026-01-0{number + 1}T00:00:00Z"))
        os.utime(images[-1].directory, (number, number))
    (build.images / ".workspace-aaaa.partial").mkdir()
    build.prune(keep=Path(images[-1].directory))
    assert sorted(path.name for path in build.images.iterdir()) == [images[2].name, images[3].name]


def test_the_command_line_answers_json_and_refuses_with_exit_code_1(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(ImageBuild(repository, tmp_path / "build"), image_inputs.collect(repository))
    options = ["image", "--repository", str(repository), "--build", str(tmp_path / "build"), "--json"]
    assert image_build.main(options) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"]
    assert not answer["changed"]
    assert answer["image"].endswith("image.qcow2")
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
    for name in ("boot", "proc", "tmp"):
        (tmp_path / "root" / name).mkdir(parents=True)
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
