"""Build the golden workspace image: base tree → Packer and Ansible on the tree → disk; or reuse it, and say why.

    python -m saw.image.build image --repository . --build build      # what the image_build playbook calls
    python -m saw.image.build image --variant gpu --module-key FILE --module-certificate FILE
    python -m saw.image.build image --secure-boot-key FILE --secure-boot-certificate FILE --secure-boot-variables FILE
    python -m saw.image.build assemble --root TREE --output FILE --seed DIGEST   # what Packer calls at its end
    python -m saw.image.build wheelhouse --repository . --build build [--group controller]
    python -m saw.image.build host-tar --repository . --build build

Result: ``build/images/workspace-<digest12>/{image.qcow2, vmlinuz, sbom/, provenance.json, inputs.json, build.json}``, for the
variant gpu ``workspace-gpu-<digest12>``. The last file is written last: a directory without it is an unfinished build and is
thrown away by the next.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from saw.errors import SawError
from saw.files import write_atomic
from saw.image import inputs as image_inputs
from saw.image.base import base_tar
from saw.image.base_os import base_os, variable_file
from saw.image.disk import ImageError, assemble, free_space_needed, run
from saw.image.edr import NONE, PROVIDERS, VARIABLE, ImageEdr, chosen, variables_file
from saw.image.provenance import Build, write_provenance
from saw.image.sbom import Sources, make_sboms
from saw.image.secure_boot import VARIABLE as SECURE_BOOT
from saw.image.secure_boot import OwnerKey, SignedBy, owner_key, place_store, sign
from saw.image.variant import CPU, VARIANTS, ModuleKey, Variant, certificate_digest, key_for, variant_of
from saw.image.wheelhouse import wheelhouse
from saw.lab.nspawn import LabNetwork, LightHost, known_hosts, login_key_of

Say = Callable[[str], None]
NEED_BYTES = 3 * 1024**3
"""Free space that one build takes at most: the tree, the root file system, the raw disk and the image at the same time."""


class GoldenImage(msgspec.Struct, frozen=True):
    """A finished image on this machine."""

    name: str
    directory: str
    image: str
    image_sha256: str
    inputs_digest: str
    created: str
    seconds: float
    kernel: str
    variant: str = "cpu"
    evidence: dict[str, str] = msgspec.field(default_factory=dict)
    """Files beside the image (path → SHA-256): bills of materials, provenance, and the owner's variable store."""
    secure_boot: SignedBy | None = None


@dataclass(frozen=True)
class ImageBuild:
    """One build: where the repository and the build directory are, how to report progress, what variant is built, and what is
    chosen of EDR.

    ``module_key`` is what the variant ``gpu`` signs its kernel modules with, ``owner`` what the boot image is signed with.
    """

    repository: Path
    build: Path
    say: Say = print
    network: LabNetwork = LabNetwork("sawimg", "10.78.0")  # noqa: RUF009 - frozen value object
    variant: Variant = CPU
    module_key: ModuleKey | None = None
    edr: ImageEdr = NONE
    owner: OwnerKey | None = None

    @property
    def options(self) -> dict[str, str]:
        """What was chosen, as the record of the build names it."""
        return {**self.edr.options, **({"secure_boot": "signed"} if self.owner else {})}

    @property
    def images(self) -> Path:
        """Directory of finished images."""
        return self.build / "images"

    def latest(self) -> tuple[GoldenImage, image_inputs.Inputs] | None:
        """Return the newest finished image of the variant with these options and its inputs, or None."""
        found = [item for item in self._finished() if self._is_ours(*item)]
        return max(found, key=lambda item: item[0].created) if found else None

    def _is_ours(self, image: GoldenImage, inputs: image_inputs.Inputs) -> bool:
        return image.variant == self.variant.name and inputs.options == self.options

    def _finished(self) -> list[tuple[GoldenImage, image_inputs.Inputs]]:
        found = []
        for record in self.images.glob("workspace-*/build.json"):
            try:
                image = msgspec.json.decode(record.read_bytes(), type=GoldenImage)
                inputs = msgspec.json.decode(record.with_name("inputs.json").read_bytes(), type=image_inputs.Inputs)
            except (OSError, msgspec.DecodeError):
                continue
            if Path(image.image).exists():
                found.append((image, inputs))
        return found

    def inputs(self) -> image_inputs.Inputs:
        """Read everything that the image is made of."""
        given = {"module-certificate": certificate_digest(self.module_key)} if self.module_key else {}
        given |= self.owner.inputs if self.owner else {}
        return image_inputs.collect(self.repository, self.variant, given, self.edr, self.options)

    def ensure(self) -> tuple[GoldenImage, str]:
        """Return the image for the present inputs and the reason why it was built or reused."""
        inputs = self.inputs()
        newest = self.latest()
        if newest and newest[1].digest == inputs.digest:
            return newest[0], f"reused: the inputs have not changed (digest {inputs.digest[:12]})"
        if newest:
            changed = inputs.changed_since(newest[1])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            reason = f"rebuilt: {', '.join(changed[:5])}{more} changed"
        else:
            reason = "built: there is no finished image yet"
        self.say(f"golden image will be {reason}")
        return self.make(inputs), reason

    def make(self, inputs: image_inputs.Inputs) -> GoldenImage:
        """Build the image for ``inputs``."""
        begin, begun = time.monotonic(), _now()
        signed_by = self.owner.signed_by if self.owner else None
        name = f"{self.variant.prefix}{inputs.digest[:12]}"
        target = self.images / name
        if target.exists():
            shutil.rmtree(target)
        free_space_needed(self.build, NEED_BYTES * (1 if self.variant == CPU else 2))
        cache = self.build / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        system = base_os(self.repository)
        packages = self.repository / "packer" / system.packages
        self.say("  base tree from the distribution's packages")
        more = self.repository / "packer" / self.edr.packages if self.edr.packages else None
        base = base_tar(packages, cache, system, self.variant, more)
        self.say("  offline wheelhouse for /opt/saw")
        wheels = wheelhouse(self.repository, cache)
        self.say("  MCP servers")
        servers = self.mcp_servers(cache)
        self.say("  Packer: Ansible roles on the tree, then the disk")
        host = LightHost("image", self.network.prefix + ".10", self.build / "image-tree", self.network, booted=False)
        host.down(purge=True)
        try:
            host.up(base)
            work = target.with_name(f".{name}.partial")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            write_atomic(work / "edr.json", variables_file(self.edr))
            self.packer(host, wheels, servers, inputs.digest, work / "image.qcow2")
            (work / "edr.json").unlink()
            disk = json.loads((work / "image.disk.json").read_text(encoding="utf-8"))
            shutil.copyfile(host.root / f"boot/vmlinuz-{disk['kernel']}", work / "vmlinuz")
            write_atomic(work / "inputs.json", msgspec.json.encode(inputs))
            self.say("  bills of materials and provenance")
            bills = make_sboms(Sources(host.root, wheels, servers), work, name=name, seed=inputs.digest)
            made = Build(name, disk["sha256"], inputs, system.suite, base, wheels, begun, _now(), self.variant.name)
            evidence = {**bills, **write_provenance(made, bills, work)}
            if self.owner and signed_by:
                evidence |= place_store(self.owner, work, signed_by)
        finally:
            host.down(purge=True)
            self.network.down()
        os.replace(work, target)
        image = GoldenImage(
            name, str(target), str(target / "image.qcow2"), disk["sha256"], inputs.digest,
            _now(), round(time.monotonic() - begin, 1), disk["kernel"], self.variant.name, evidence,
            signed_by,
        )  # fmt: skip
        write_atomic(target / "build.json", msgspec.json.format(msgspec.json.encode(image)))
        self.prune(keep=target)
        return image

    def prune(self, keep: Path) -> None:
        """Keep the two newest images of the variant with these options; throw away what interrupted builds left."""
        for unfinished in self.images.glob(".workspace-*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
        others = {image.name for image, inputs in self._finished() if not self._is_ours(image, inputs)}
        ours = [path for path in self.images.glob("workspace-*") if variant_prefix(path.name) == self.variant.prefix]
        kept = [path for path in ours if path.name not in others]
        for old in sorted(kept, key=lambda path: path.stat().st_mtime)[:-2]:
            if old != keep:
                shutil.rmtree(old, ignore_errors=True)

    def mcp_servers(self, cache: Path) -> Path:
        """Install the locked MCP servers (npm) once per lock content; return the directory with node_modules."""
        lock = self.repository / "packer/mcp/package-lock.json"
        target = cache / f"mcp-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
        if target.exists():
            return target
        work = cache / f".{target.name}.partial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(lock.with_name(name), work / name)
        run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(work))
        os.replace(work, target)
        return target

    def link_collection(self) -> Path:
        """Make this repository visible as an installed collection; return the collections path."""
        path = self.build / "installed"
        link = path / "ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink() or link.resolve() != self.repository:
            link.unlink(missing_ok=True)
            link.symlink_to(self.repository)
        return path

    def packer(self, host: LightHost, wheels: Path, servers: Path, seed: str, output: Path) -> None:
        """Run ``packer build`` against ``host``; its output goes to ``build/packer.log``."""
        values = {
            "ssh_host": host.address, "ssh_key_file": login_key_of(host.lab), "known_hosts_file": known_hosts(host.lab, [host]),
            "root_tree": host.root, "output": output, "seed": seed, "wheelhouse": wheels, "mcp_servers": servers,
            "python": sys.executable, "ansible_playbook": Path(sys.executable).with_name("ansible-playbook"),
            "edr_variables": output.with_name("edr.json"),
            "playbook": os.environ.get("SAW_IMAGE_PLAYBOOK", str(self.repository / "playbooks/workspace_converge.yml")),
        }  # fmt: skip
        if self.module_key:
            values |= {
                "image_variant": self.variant.name, "module_key": self.module_key.key,
                "module_certificate": self.module_key.certificate,
            }  # fmt: skip
        if self.owner:
            values |= {"secure_boot_key": self.owner.key, "secure_boot_certificate": self.owner.certificate}
        options = [f"-var-file={variable_file(self.repository)}"]
        options += [option for key, value in values.items() for option in ("-var", f"{key}={value}")]
        log = self.build / "packer.log"
        environment = {
            **os.environ, "ANSIBLE_COLLECTIONS_PATH": str(self.link_collection()), "CHECKPOINT_DISABLE": "1",
            "ANSIBLE_CONFIG": str(self.repository / "ansible.cfg"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        with log.open("wb") as stream:
            done = subprocess.run(
                ["packer", "build", "-color=false", "-timestamp-ui", *options, str(self.repository / "packer")],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, check=False, cwd=self.repository,
            )  # fmt: skip
        if done.returncode:
            tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise ImageError(f"packer failed ({done.returncode}):\n{tail}", cure=f"read {log}")


def variant_prefix(name: str) -> str:
    """Return the prefix that says of which variant the image ``name`` is; the longest one counts."""
    return max((one.prefix for one in VARIANTS.values() if name.startswith(one.prefix)), key=len, default="")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _signer(options: argparse.Namespace) -> Callable[[Path], None] | None:
    key, certificate = options.secure_boot_key, options.secure_boot_certificate
    if bool(key) != bool(certificate):
        raise ImageError("a key needs its certificate and the other way round", cure="give both or none")
    return partial(sign, key=Path(key), certificate=Path(certificate)) if key else None


def main(argv: list[str] | None = None) -> int:
    """Command line of this module (see its text)."""
    parser = argparse.ArgumentParser(prog="python -m saw.image.build")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("image", "wheelhouse", "host-tar"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--repository", type=Path, default=Path())
        sub.add_argument("--build", type=Path, default=Path("build"))
        sub.add_argument("--json", action="store_true")
        if verb == "image":
            sub.add_argument("--variant", default="cpu", help="cpu (the default), or gpu with NVIDIA's driver")
            sub.add_argument("--module-key", type=Path, help="owner's key (PEM) for kernel modules; with gpu")
            sub.add_argument("--module-certificate", type=Path, help="its certificate (PEM or DER)")
            for part, text in (
                ("key", "owner's key (PEM) that the boot image is signed with"), ("certificate", "its certificate (PEM)"),
                ("variables", "variable store with the owner's keys: saw image secure-boot enrol"),
            ):  # fmt: skip
                default = os.environ.get(f"{SECURE_BOOT}_{part.upper()}", "")
                sub.add_argument(f"--secure-boot-{part}", default=default, metavar="FILE", help=text)
            sub.add_argument("--edr", choices=PROVIDERS, help=f"endpoint detection of the image (or {VARIABLE})")
            sub.add_argument("--edr-variables", help="variables of the role edr, a YAML file")
            sub.add_argument("--edr-signatures", help="signatures of ClamAV for EDR=embedded, a folder")
        if verb == "wheelhouse":
            sub.add_argument("--group", help="a dependency group that is wanted besides, such as controller")
    disk = verbs.add_parser("assemble")
    disk.add_argument("--root", type=Path, required=True)
    disk.add_argument("--output", type=Path, required=True)
    disk.add_argument("--seed", required=True)
    disk.add_argument("--secure-boot-key", default="", help="sign the boot image with it; empty: unsigned")
    disk.add_argument("--secure-boot-certificate", default="")
    options = parser.parse_args(argv)
    try:
        if options.verb == "assemble":
            made = assemble(options.root, options.output, seed=options.seed, sign=_signer(options))
            print(f"{made.path}: sha256 {made.sha256}")
            return 0
        repository, build = options.repository.resolve(), options.build.resolve()
        if options.verb == "wheelhouse":
            print(wheelhouse(repository, build / "cache", options.group))
        elif options.verb == "host-tar":
            (build / "cache").mkdir(parents=True, exist_ok=True)
            print(base_tar(repository / "packer/packages/host.txt", build / "cache", base_os(repository)))
        else:
            quiet: Say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
            said = {
                VARIABLE: options.edr, f"{VARIABLE}_VARIABLES": options.edr_variables,
                f"{VARIABLE}_SIGNATURES": options.edr_signatures,
            }  # fmt: skip
            edr = chosen({**os.environ, **{name: value for name, value in said.items() if value is not None}})
            variant = variant_of(options.variant)
            key = key_for(variant, options.module_key, options.module_certificate)
            owner = owner_key(options.secure_boot_key, options.secure_boot_certificate, options.secure_boot_variables)
            builder = ImageBuild(repository, build, quiet, variant=variant, module_key=key, edr=edr, owner=owner)
            image, reason = builder.ensure()
            answer = {
                "ok": True,
                "changed": not reason.startswith("reused"),
                "reason": reason,
                **msgspec.to_builtins(image),
            }
            print(json.dumps(answer) if options.json else f"{image.image}\n{reason}")
    except SawError as error:
        print(f"image build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
