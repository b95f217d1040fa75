"""``saw vm``: the qemu driver on a hypervisor host (root)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from saw.attest.image_record import PAYLOAD_TYPE
from saw.errors import ConfigError
from saw.policy.envelope import read_envelope
from saw.vm import data_disk, golden, measure, qemu, released, trust
from saw.vm.spec import STATE, load_spec, parse_spec


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    top = argparse.ArgumentParser(prog="saw vm", description="Virtual machines of this hypervisor.")
    verbs = top.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="make every missing part of a VM (idempotent); nothing is started")
    create.add_argument("--spec", required=True, help="file with the specification, or - for standard input")
    for verb, text in {
        "start": "start the VM",
        "stop": "ask the guest to power off, then stop it",
        "poweroff": "end the VM at once",
        "destroy": "end the VM and remove disks, vTPM and network",
        "status": "show one VM",
        "escrow": "print the sealed recovery key of the VM's encrypted data disk, for its operator",
        "unlock": "take a recovery key from standard input for the next start alone, which seals the disk to the vTPM anew",
        "exec": "run the VM in the foreground (what its unit does)",
    }.items():
        verbs.add_parser(verb, help=text).add_argument("id")
    rebuild = verbs.add_parser("rebuild", help="throw the root disk away; data disk and vTPM stay. The VM must not run")
    rebuild.add_argument("id")
    rebuild.add_argument("--image", default="", help="another golden image (default: the present one)")
    rebuild.add_argument("--image-sha256", default="", help="its SHA-256")
    image = verbs.add_parser("check-image", help="compare an image file with its SHA-256; nothing changes")
    image.add_argument("--image", required=True, type=Path)
    image.add_argument("--image-sha256", required=True)
    find = verbs.add_parser("find-image", help="find the file of an image on this hypervisor by its SHA-256")
    find.add_argument("--image-sha256", required=True)
    find.add_argument("--name", default="", help="its name: files with it in their path are read first")
    verbs.add_parser("list", help="list the VMs")
    verbs.add_parser("firmware", help="print the digest of the firmware that this hypervisor's VMs start with")
    boot = verbs.add_parser("measure", help="boot an image once with a fresh vTPM and print its PCR values")
    boot.add_argument("--image", type=Path, required=True)
    boot.add_argument("--patience", type=float, default=300.0)
    accept = verbs.add_parser("accept", help="take a hand-over: the officers' roots, release records, revoked images")
    accept.add_argument(
        "--from", dest="source", default="-", metavar="FILE", help="what saw image hand-over printed, or -"
    )
    accept.add_argument("--pin", action="store_true", help="take the first root too, where this hypervisor has none")
    accept.add_argument("--dry-run", action="store_true", help="verify it and keep nothing")
    for verb in ("create", "start", "rebuild"):
        verbs.choices[verb].add_argument(
            "--record", type=Path, help="a signed release record of the image; it is verified and kept"
        )
    for sub in verbs.choices.values():
        sub.add_argument("--json", action="store_true", help="machine-readable output")
    return top


def read_input(source: str) -> bytes:
    """Return the content of the file ``source``, or of standard input for ``-``."""
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}", cure="name a readable file, or -") from error


def main(argv: list[str]) -> int:
    """Run ``saw vm``."""
    options = parser().parse_args(argv)
    answer: dict[str, Any]
    if getattr(options, "record", None):
        envelope = read_envelope(read_input(str(options.record)), PAYLOAD_TYPE)
        released.accept(msgspec.json.encode(trust.HandOver(records=(envelope,))))
    if options.verb == "create":
        answer = qemu.create(parse_spec(read_input(options.spec)))
    elif options.verb == "list":
        names = sorted(path.parent.name for path in STATE.glob("*/spec.json"))
        answer = {"changed": False, "vms": [qemu.status(load_spec(name)) for name in names]}
    elif options.verb == "check-image":
        golden.matches(golden.hash_image(options.image), options.image_sha256)
        answer = {"changed": False, "image": str(options.image), "image_sha256": options.image_sha256}
    elif options.verb == "find-image":
        answer = {"image": str(golden.find(options.image_sha256, options.name)), "image_sha256": options.image_sha256}
    elif options.verb == "rebuild":
        answer = qemu.rebuild(load_spec(options.id), options.image, options.image_sha256)
    elif options.verb == "accept":
        taken = released.accept(read_input(options.source), pin=options.pin, dry=options.dry_run)
        answer = msgspec.to_builtins(taken)
    elif options.verb == "firmware":
        answer = {"firmware_sha256": measure.firmware_sha256()}
    elif options.verb == "measure":
        answer = measure.reference_boot(options.image, patience=options.patience)
    elif options.verb == "destroy" and not (STATE / options.id / "spec.json").exists():
        answer = {"changed": False}
    else:
        spec = load_spec(options.id)
        if options.verb == "exec":
            return qemu.execute(spec)
        if options.verb == "escrow":
            print(msgspec.json.encode(data_disk.escrow(spec)).decode())
            return 0
        if options.verb == "unlock":
            data_disk.unlock(spec, read_input("-").decode("ascii", "replace").strip())
            print(json.dumps({"ok": True, "changed": True}) if options.json else "kept for the next start")
            return 0
        actions = {"start": qemu.start, "stop": qemu.stop, "poweroff": qemu.power_off, "destroy": qemu.destroy}
        status = options.verb == "status"
        answer = qemu.status(spec) if status else {"changed": actions[options.verb](spec)}
        if options.verb == "destroy":
            answer |= data_disk.evidence(spec)
    answer.setdefault("changed", False)
    print(json.dumps({"ok": True, **answer}) if options.json else "\n".join(f"{k}: {v}" for k, v in answer.items()))
    return 0
