"""Build the golden workspace image: base tree → Packer and Ansible on the tree → disk; or reuse it, and say why.

    python -m saw.image.build image --repository . --build build      # what the image_build playbook calls
    python -m saw.image.build image --variant gpu --module-key FILE --module-certificate FILE
    python -m saw.image.build image --secure-boot-key FILE --secure-boot-certificate FILE --secure-boot-variables FILE
    python -m saw.image.build image --root-verity    # a root that is read-only and verified (saw.image.verified_root)
    python -m saw.image.build image --source qemu    # in a virtual machine, under KVM or emulation (docs/images.md)
    python -m saw.image.build assemble --root TREE --output FILE --seed DIGEST   # what Packer calls at its end
    python -m saw.image.build wheelhouse --repository . --build build [--group controller]
    python -m saw.image.build host-tar --repository . --build build

Result: ``build/images/workspace-<digest12>/{image.qcow2, vmlinuz, sbom/, provenance.json, packages.json, baseline.dat,
inputs.json, build.json}``, for the variant gpu ``workspace-gpu-<digest12>``. A directory gets its name when all of it is there;
what has another name (``.workspace-….partial``) is an unfinished build and is thrown away by the next. A finished image is never
replaced, and removed only when nothing uses it (saw.image.usage).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from saw.errors import SawError
from saw.files import write_atomic
from saw.image import inputs as image_inputs
from saw.image import machine, package_state, usage, verified_root
from saw.image.base_os import DEFAULT, base_os, variable_file
from saw.image.disk import ImageError, assemble, digest_of, free_space_needed, run, writable_root
from saw.image.edr import NONE, PROVIDERS, VARIABLE, ImageEdr, chosen, variables_file
from saw.image.finished import Finished, GoldenImage, finished_in, made_of, packages_of, why
from saw.image.hardening import refuse_without_scanner, score_tree
from saw.image.packages import FILE, PackageSet, write_set
from saw.image.provenance import Build, write_provenance
from saw.image.sbom import Sources, make_sboms
from saw.image.secure_boot import VARIABLE as SECURE_BOOT
from saw.image.secure_boot import OwnerKey, owner_key, place_store, sign
from saw.image.settle import ENVIRONMENT, settled_umask
from saw.image.variant import CPU, VARIANTS, ModuleKey, Variant, certificate_digest, key_for, variant_of
from saw.image.wheelhouse import wheelhouse
from saw.lab.exclusive import exclusive
from saw.lab.nspawn import LabNetwork, LightHost, known_hosts, login_key_of

Say = Callable[[str], None]
SYSTEM = "SAW_IMAGE_BASE_OS"
"""Environment variable for the base operating system."""
MACHINE = "machine"
"""Folder of the virtual machine, in that of the unfinished image."""
NEED_BYTES = 3 * 1024**3
"""Free space that one build takes at most: the tree, the root file system, the raw disk and the image at the same time."""


@dataclass(frozen=True)
class ImageBuild:
    """One build: where the repository and the build directory are, how to report progress, what variant is built, and what is
    chosen of EDR.

    ``source`` is where Packer provisions the tree, in a light host (``tree``) or in a virtual machine (``qemu``); it is no input,
    since both make the same image. ``system`` is the base operating system (``packer/pkrvars``). ``module_key`` is what the
    variant ``gpu`` signs its kernel modules with, ``owner`` what the boot image is signed with; ``choice`` says where packages
    come from. ``root_verity`` makes the root read-only and verified.
    """

    repository: Path
    build: Path
    say: Say = print
    network: LabNetwork = LabNetwork("sawimg", "10.78.0")  # noqa: RUF009 - frozen value object
    variant: Variant = CPU
    module_key: ModuleKey | None = None
    edr: ImageEdr = NONE
    choice: package_state.Choice = package_state.Choice()  # noqa: RUF009 - frozen value object
    owner: OwnerKey | None = None
    source: str = machine.SOURCES[0]
    system: str = DEFAULT
    root_verity: bool = False

    @property
    def options(self) -> dict[str, str]:
        """What was chosen, as the record of the build names it."""
        signed = {"secure_boot": "signed"} if self.owner else {}
        verified = {verified_root.OPTION: "sha256"} if self.root_verity else {}
        return {**self.edr.options, **signed, **verified, **({"system": self.system} if self.system != DEFAULT else {})}

    @property
    def images(self) -> Path:
        """Directory of finished images."""
        return self.build / "images"

    @property
    def base(self) -> package_state.Base:
        """What the base tree of the image is made of."""
        system, packer = base_os(self.repository, self.system), self.repository / "packer"
        more = packer / self.edr.packages if self.edr.packages else None
        return package_state.Base(packer / system.packages, self.build / "cache", system, self.variant, more)

    def latest(self) -> Finished | None:
        """Return the newest finished image of the variant with these options and its inputs, or None."""
        return next(iter(self.ours()), None)

    def ours(self) -> list[Finished]:
        """Return all finished images of the variant with these options and their inputs, the newest first."""
        found = [item for item in finished_in(self.images) if self._is_ours(*item)]
        return sorted(found, key=lambda item: item[0].created, reverse=True)

    def sources(self) -> image_inputs.Inputs:
        """Return the present inputs but for the packages."""
        given = {"module-certificate": certificate_digest(self.module_key)} if self.module_key else {}
        given |= self.owner.inputs if self.owner else {}
        return image_inputs.collect(self.repository, self.variant, given, self.edr, self.options)

    def matching(self) -> GoldenImage | None:
        """Return the newest image that was made of the present sources, whatever its packages, or None."""
        sources = self.sources()
        return next((image for image, inputs in self.ours() if made_of(inputs, sources)), None)

    def _is_ours(self, image: GoldenImage, inputs: image_inputs.Inputs) -> bool:
        return image.variant == self.variant.name and inputs.options == self.options

    def ensure(self) -> tuple[GoldenImage, str]:
        """Return the image for the present inputs, packages included, and the reason why it was built or reused."""
        sources, ours = self.sources(), self.ours()
        matching = next((item for item in ours if made_of(item[1], sources)), None)
        if matching and self.choice.mode == "reuse" and not self.choice.pinned and packages_of(matching[0]) is None:
            return matching[0], f"reused: the inputs have not changed (digest {matching[1].digest[:12]})"
        newest = packages_of(ours[0][0]) if ours else None
        packages, note = package_state.settle(
            self.base, self.choice, newest, packages_of(matching[0]) if matching else None
        )
        inputs = sources.given(image_inputs.PACKAGES, packages.digest)
        same = next((image for image, theirs in ours if theirs.digest == inputs.digest), None)
        if same:
            return same, f"reused: the inputs have not changed (digest {inputs.digest[:12]}); {note}"
        reason = why(inputs, packages, ours[0][1], newest) if ours else "built: there is no finished image yet"
        self.say(f"golden image will be {reason}; {note}")
        return self.make(inputs, packages), reason

    def news(self, image: GoldenImage) -> None:
        """Say what ``image`` lacks by now; the archive is asked once a day."""
        package_state.news(self.base, packages_of(image), self.say)

    @settled_umask()
    def make(self, inputs: image_inputs.Inputs, packages: PackageSet) -> GoldenImage:
        """Build the image for ``inputs`` with ``packages``; a finished one is never replaced."""
        begin, begun = time.monotonic(), _now()
        signed_by = self.owner.signed_by if self.owner else None
        name = f"{self.variant.prefix}{inputs.digest[:12]}"
        target = self.images / name
        self._make_way(target)
        refuse_without_scanner()
        free_space_needed(self.build, NEED_BYTES * ((1 if self.variant == CPU else 2) + (self.source == "qemu")))
        cache = self.build / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        self.say("  base tree from the distribution's packages")
        base = self.base.tar(packages)
        self.say("  offline wheelhouse for /opt/saw")
        wheels = wheelhouse(self.repository, cache, python=self.base.system.runtime_python)
        self.say("  MCP servers")
        servers = self.mcp_servers(cache)
        served = self.source == machine.SOURCES[0]
        self.say(f"  Packer: Ansible roles {'on the tree' if served else 'in a machine'}, then the disk")
        host = LightHost(
            "image", self.network.prefix + ".10", self.build / "image-tree", self.network, booted=False,
            environment=tuple(f"{name}={value}" for name, value in ENVIRONMENT.items()),
        )  # fmt: skip
        host.down(purge=True)
        work = target.with_name(f".{name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            if served:
                host.up(base)
            else:
                host.unpack(base)
            write_atomic(work / "edr.json", variables_file(self.edr))
            self.packer(host, wheels, servers, inputs.digest, work / "image.qcow2")
            (work / "edr.json").unlink()
            disk = json.loads((work / "image.disk.json").read_text(encoding="utf-8"))
            shutil.copyfile(host.root / f"boot/vmlinuz-{disk['kernel']}", work / "vmlinuz")
            write_atomic(work / "inputs.json", msgspec.json.encode(inputs))
            self.say("  bills of materials and provenance")
            write_set(work / FILE, packages)
            bills = {
                **make_sboms(Sources(host.root, wheels, servers), work, name=name, seed=inputs.digest),
                FILE: digest_of(work / FILE),
            }
            made = Build(name, disk["sha256"], inputs, packages, base, wheels, begun, _now(), self.variant.name)
            evidence = {**bills, **write_provenance(made, bills, work)}
            self.say("  the scanner's score of its hardening")
            evidence |= score_tree(host.root, work)
            if self.owner and signed_by:
                evidence |= place_store(self.owner, work, signed_by)
        finally:
            host.down(purge=True)
            self.network.down()
            shutil.rmtree(work / MACHINE, ignore_errors=True)
        image = GoldenImage(
            name, str(target), str(target / "image.qcow2"), disk["sha256"], inputs.digest,
            _now(), round(time.monotonic() - begin, 1), disk["kernel"], self.variant.name, evidence, packages.note(),
            signed_by, disk["root_hash"],
        )  # fmt: skip
        write_atomic(work / "build.json", msgspec.json.format(msgspec.json.encode(image)))
        os.replace(work, target)  # from here on it is finished, and not before
        self.prune(name)
        return image

    def _make_way(self, target: Path) -> None:
        """Remove what lies where an image will be, if that is no finished one and nothing uses it."""
        if not target.exists():
            return
        if target.name in {image.name for image, _ in finished_in(self.images)}:
            raise ImageError(f"{target} is a finished image", cure="take it as it is, or move it away")
        used = usage.uses_of([target], self.build)[target.name]
        if used:
            raise ImageError(
                f"{target} is no whole image any more, and is used: {'; '.join(used)}",
                cure="restore its build.json and inputs.json from a copy, or move the folder away",
            )
        usage.remove(target)

    def prune(self, *named: str) -> list[usage.Image]:
        """Remove images of the variant with these options that nothing uses; see :func:`saw.image.usage.prune`."""
        return usage.prune(self.build, [image.name for image, _ in self.ours()], self.say, named=named)

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
        run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(work), env=ENVIRONMENT)
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
        if self.root_verity:
            values["root_verity"] = "true"
        virtual = None
        if self.source == "qemu":
            virtual = machine.prepare(host, output.with_name(MACHINE), self.build / "cache/accel.json", self.say)
            values |= virtual.variables()
        options = [f"-only=workspace.{'qemu.machine' if virtual else 'null.tree'}"]
        options.append(f"-var-file={variable_file(self.repository, self.system)}")
        options += [option for key, value in values.items() for option in ("-var", f"{key}={value}")]
        log = self.build / "packer.log"
        environment = {
            **os.environ, **ENVIRONMENT, "ANSIBLE_COLLECTIONS_PATH": str(self.link_collection()), "CHECKPOINT_DISABLE": "1",
            "ANSIBLE_CONFIG": str(self.repository / "ansible.cfg"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        command = ["packer", "build", "-color=false", "-timestamp-ui", *options, str(self.repository / "packer")]
        machine.provision(command, log, self.say, virtual, environment=environment, folder=self.repository)


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
            sub.add_argument(
                "--source", default=os.environ.get(machine.VARIABLE, ""),
                help=f"where the roles run: tree, a light host (the default), or qemu, a virtual machine ({machine.VARIABLE})",
            )  # fmt: skip
            sub.add_argument(
                "--base-os",
                default=os.environ.get(SYSTEM) or DEFAULT,
                help=f"base system, see packer/pkrvars (or {SYSTEM})",
            )
            sub.add_argument(
                "--root-verity", action="store_true", default=None,
                help=f"make the root read-only and check each block of it ({verified_root.VARIABLE}=1)",
            )  # fmt: skip
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
        if verb in {"image", "host-tar"}:
            sub.add_argument(
                "--packages", metavar="HOW", help=f"ask, fresh, reuse, or a packages.json ({package_state.VARIABLE})"
            )
        if verb == "wheelhouse":
            sub.add_argument("--group", help="a dependency group that is wanted besides, such as controller")
    disk = verbs.add_parser("assemble")
    disk.add_argument("--root", type=Path, required=True)
    disk.add_argument("--machine-disk", type=Path, help="make the tree out of this disk of a machine first")
    disk.add_argument("--output", type=Path, required=True)
    disk.add_argument("--seed", required=True)
    disk.add_argument("--secure-boot-key", default="", help="sign the boot image with it; empty: unsigned")
    disk.add_argument("--secure-boot-certificate", default="")
    disk.add_argument("--root-verity", choices=("true", "false"), default="false", help="read-only and verified")
    options = parser.parse_args(argv)
    try:
        if options.verb == "assemble":
            if options.machine_disk:
                print(
                    f"{options.root}: {machine.take_over(options.machine_disk, options.root)} paths out of the machine's disk"
                )
            layout = verified_root.layout if options.root_verity == "true" else writable_root
            made = assemble(options.root, options.output, seed=options.seed, sign=_signer(options), layout=layout)
            print(f"{made.path}: sha256 {made.sha256}")
            return 0
        repository, build = options.repository.resolve(), options.build.resolve()
        quiet: Say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        if options.verb == "wheelhouse":
            print(wheelhouse(repository, build / "cache", options.group))
        elif options.verb == "host-tar":
            base = package_state.Base(repository / "packer/packages/host.txt", build / "cache", base_os(repository))
            print(_host_tar(base, _choice(options, "reuse"), lambda: exclusive(build, quiet, wait=True)))
        else:
            said = {
                VARIABLE: options.edr, f"{VARIABLE}_VARIABLES": options.edr_variables,
                f"{VARIABLE}_SIGNATURES": options.edr_signatures,
            }  # fmt: skip
            edr = chosen({**os.environ, **{name: value for name, value in said.items() if value is not None}})
            variant = variant_of(options.variant)
            key = key_for(variant, options.module_key, options.module_certificate)
            choice = _choice(options, "ask")
            owner = owner_key(options.secure_boot_key, options.secure_boot_certificate, options.secure_boot_variables)
            with exclusive(build, quiet):
                image, reason = ImageBuild(
                    repository, build, quiet, variant=variant, module_key=key, edr=edr, choice=choice, owner=owner,
                    source=machine.source_of(options.source), system=options.base_os,
                    root_verity=options.root_verity or verified_root.chosen(),
                ).ensure()  # fmt: skip
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


def _host_tar(
    base: package_state.Base, choice: package_state.Choice, lock: Callable[[], AbstractContextManager[None]]
) -> Path:
    """Return the tar of the light hosts; several tests ask for it at the same time, and one of them makes it."""
    known = base.known()
    if known and choice == package_state.Choice("reuse"):
        return base.tar(known[0])
    with lock():
        base.cache.mkdir(parents=True, exist_ok=True)
        return base.tar(package_state.settle(base, choice, known[0] if known else None)[0])


def _choice(options: argparse.Namespace, default: str) -> package_state.Choice:
    said = {package_state.VARIABLE: options.packages} if options.packages else {}
    return package_state.chosen(default, {**os.environ, **said})


if __name__ == "__main__":
    sys.exit(main())
