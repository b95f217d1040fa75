"""The image variant gpu adds to an image and leaves the image cpu as it is: inputs, base tree, names, records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from image_rig import package_set

from saw.attest.image_record import RecordInvalid, parse_record
from saw.image import inputs as image_inputs
from saw.image.base import base_packages, base_path
from saw.image.base_os import base_os
from saw.image.build import GoldenImage, ImageBuild, main, variant_prefix
from saw.image.disk import ImageError
from saw.image.inputs import Inputs
from saw.image.provenance import Build, statement
from saw.image.variant import CPU, GPU, ModuleKey, certificate_digest, key_for, variant_of

pytestmark = pytest.mark.control("GPU-01", "IMG-01")
ROOT = Path(__file__).resolve().parents[3]
LISTING = ROOT / "packer/packages/workspace.txt"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    for name in (
        "packer/packages/workspace.txt",
        "packer/packages/gpu.txt",
        "roles/gpu_driver/tasks/main.yml",
        "uv.lock",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


@pytest.fixture
def key(tmp_path: Path) -> ModuleKey:
    pair = ModuleKey(tmp_path / "modules.key", tmp_path / "modules.der")
    pair.key.write_text("key")
    pair.certificate.write_text("certificate")
    return pair


def test_what_is_for_gpus_alone_is_no_input_of_the_image_cpu(repository: Path) -> None:
    cpu, gpu = (image_inputs.collect(repository, variant) for variant in (CPU, GPU))
    assert gpu.changed_since(cpu) == ["packer/packages/gpu.txt", "roles/gpu_driver/tasks/main.yml"]
    for name in gpu.changed_since(cpu):
        (repository / name).write_text("changed")
    assert image_inputs.collect(repository) == cpu
    assert image_inputs.collect(repository, GPU).changed_since(gpu) == gpu.changed_since(cpu)
    (repository / "uv.lock").write_text("changed")
    assert image_inputs.collect(repository).changed_since(cpu) == ["uv.lock"]


def test_the_owners_certificate_is_an_input_and_the_key_is_not(repository: Path, key: ModuleKey) -> None:
    def collect() -> Inputs:
        return image_inputs.collect(repository, GPU, {"module-certificate": certificate_digest(key)})

    before = collect()
    key.key.write_text("another key")
    assert collect() == before
    key.certificate.write_text("another certificate")
    assert collect().changed_since(before) == ["module-certificate"]


def test_the_base_trees_of_variants_and_of_package_sets_have_names_of_their_own(tmp_path: Path) -> None:
    base, packages = base_os(ROOT), package_set()
    cpu, gpu = (base_path(LISTING, tmp_path, base, packages, variant) for variant in (CPU, GPU))
    assert (cpu.name[:15], gpu.name[:19]) == ("base-workspace-", "base-workspace-gpu-"[:19])
    later = package_set(packages.packages, "openssl", asked="2026-05-05")
    assert base_path(LISTING, tmp_path, base, later) == cpu, "the day and the label are no part of the content"
    newer = package_set({**packages.packages, "openssl": "3.5.1-2"})
    assert base_path(LISTING, tmp_path, base, newer) != cpu
    more = set(base_packages(LISTING, GPU)) - set(base_packages(LISTING))
    assert {"nvidia-open-kernel-dkms", "nvidia-smi", "firmware-nvidia-gsp", "nvidia-persistenced"} <= more


def test_a_key_belongs_to_the_variant_that_signs(key: ModuleKey) -> None:
    assert key_for(CPU, None, None) is None
    assert key_for(GPU, key.key, key.certificate) == ModuleKey(key.key.resolve(), key.certificate.resolve())
    with pytest.raises(ImageError, match="needs a key"):
        key_for(GPU, key.key, None)
    with pytest.raises(ImageError, match="has no modules to sign"):
        key_for(CPU, key.key, key.certificate)
    key.certificate.unlink()
    with pytest.raises(ImageError, match="is no file"):
        key_for(GPU, key.key, key.certificate)


def test_a_variant_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert variant_of("gpu") is GPU
    assert main(["image", "--variant", "tpu", "--repository", str(ROOT)]) == 1
    assert "there is no image variant 'tpu' (take one of: cpu, gpu)" in capsys.readouterr().err
    assert main(["image", "--variant", "gpu", "--repository", str(ROOT)]) == 1
    assert "needs a key that its kernel modules are signed with" in capsys.readouterr().err


def test_each_variant_has_its_own_newest_image_and_keeps_two(tmp_path: Path) -> None:
    build = tmp_path / "build"
    for number, (name, variant) in enumerate(
        [("workspace-aa", "cpu"), ("workspace-gpu-aa", "gpu"), ("workspace-bb", "cpu"), ("workspace-gpu-bb", "gpu"),
         ("workspace-gpu-cc", "gpu")]
    ):  # fmt: skip
        folder = build / "images" / name
        folder.mkdir(parents=True)
        (folder / "image.qcow2").write_text("disk")
        (folder / "inputs.json").write_bytes(msgspec.json.encode(Inputs(name, {})))
        image = GoldenImage(
            name, str(folder), str(folder / "image.qcow2"), "0" * 64, name, f"2026-01-0{number + 1}", 1.0, "6", variant
        )
        (folder / "build.json").write_bytes(msgspec.json.encode(image))
    cpu, gpu = ImageBuild(ROOT, build), ImageBuild(ROOT, build, variant=GPU)
    assert cpu.latest()[0].name == "workspace-bb"  # type: ignore[index]
    assert gpu.latest()[0].name == "workspace-gpu-cc"  # type: ignore[index]
    cpu.prune()
    assert len(list((build / "images").iterdir())) == 5
    gpu.prune()
    assert len(list((build / "images").glob("workspace-gpu-*"))) == 2
    assert (variant_prefix("workspace-0a1b"), variant_prefix("workspace-gpu-0a1b")) == (CPU.prefix, GPU.prefix)


def test_provenance_and_release_record_name_the_variant(tmp_path: Path) -> None:
    (tmp_path / "base.tar").touch()
    for variant in ("cpu", "gpu"):
        made = Build(
            "workspace-x", "0" * 64, Inputs("d", {}), package_set(), tmp_path / "base.tar", tmp_path, "b", "e", variant
        )
        parameters = statement(made, {})["predicate"]["buildDefinition"]["externalParameters"]
        assert parameters.get("variant", "cpu") == variant
        assert ("variant" in parameters) == (variant == "gpu")
    record = {
        "format": "saw-image-release/2", "name": "workspace-gpu-x", "image_sha256": "0" * 64, "inputs_digest": "d",
        "created": "2026-01-01T00:00:00Z", "not_after": "2027-01-01T00:00:00Z", "variant": "gpu",
        "boot": {"pcrs": {str(number): "0" * 64 for number in (0, 2, 3, 4, 7, 11, 12, 13)}},
    }  # fmt: skip
    assert parse_record(rfc8785.dumps(record)).variant == "gpu"
    with pytest.raises(RecordInvalid):
        parse_record(rfc8785.dumps({**record, "variant": "tpu"}))
    del record["variant"]
    assert parse_record(rfc8785.dumps(record)).variant == "cpu"


@pytest.mark.parametrize(("variant", "code"), [("gpu", 0), ("tpu", 1)])
def test_packer_takes_known_variants_alone(tmp_path: Path, variant: str, code: int) -> None:
    names = (
        "ssh_host",
        "ssh_key_file",
        "known_hosts_file",
        "root_tree",
        "output",
        "seed",
        "wheelhouse",
        "mcp_servers",
        "python",
        "edr_variables",
    )
    private = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (tmp_path / "key").write_bytes(private)
    words = [word for name in names for word in ("-var", f"{name}={tmp_path / 'key'}")]
    done = subprocess.run(
        ["packer", "validate", "-var-file", str(ROOT / "packer/pkrvars/debian-13.pkrvars.hcl"), *words,
         "-var", f"ansible_playbook={Path(sys.executable).with_name('ansible-playbook')}",
         "-var", f"image_variant={variant}", str(ROOT / "packer")],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert ("has to be cpu or gpu" in done.stdout + done.stderr) == (code == 1)
