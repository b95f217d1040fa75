"""``saw gpu``: the driver in this image, the GPUs of this host, and the wipe of a VM whose user goes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from saw.cli.answers import Answer, read_file
from saw.cli.policy_signing import add_signing, present, signers_of
from saw.edr.service import Courier, factory_of, now
from saw.files import write_atomic
from saw.gpu import modules
from saw.gpu.check import STATE, look_at
from saw.gpu.config import DEFAULT_CONFIG, GpuConfig, read_config
from saw.gpu.driver import Driver, driver_of
from saw.gpu.findings import open_store, record
from saw.policy.keys import key_id, load_public_key

if TYPE_CHECKING:
    from saw.gpu.wipe import WipeRecord


def main(argv: list[str]) -> int:
    """Run ``saw gpu``; 1 when something is not as it must be, or was refused."""
    options = _parser().parse_args(argv)
    answer, text, code = _COMMANDS[options.command](options)
    print(msgspec.json.encode(answer).decode() if options.json else text)
    return code


def _driver(options: argparse.Namespace) -> Answer:
    certificate = modules.read_certificate(read_file(options.certificate))
    return _told(driver_of(certificate, packages=options.packages, root=options.root))


def _told(found: Driver) -> Answer:
    lines = [f"driver {found.version}, firmware {', '.join(found.firmware) or 'none'}"]
    lines += [f"{one.name:<15}{one.kernel}  signed by {one.signer or 'nobody'}" for one in found.modules]
    lines += [f"problem: {problem}" for problem in found.problems]
    answer: dict[str, Any] = {"ok": not found.problems, **msgspec.to_builtins(found)}
    return answer, "\n".join(lines), 1 if found.problems else 0


def _build(options: argparse.Namespace) -> Answer:
    changed, found = modules.ensure(sys.stdin.buffer.read(), read_file(options.certificate))
    answer = {"ok": True, "changed": changed, "modules": msgspec.to_builtins(found)}
    words = "built and signed" if changed else "right already"
    return answer, f"{len(found)} modules {words}", 0


def _check(options: argparse.Namespace) -> Answer:
    config = read_config(options.config)
    state = look_at(config, now())
    if options.report:
        config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(config.state / STATE, msgspec.json.format(msgspec.json.encode(state)) + b"\n", mode=0o600)
        store = open_store(config)
        try:
            record(state, config, store, factory_of("saw-gpu"), now())
        finally:
            store.close()
        _deliver(config)
    lines = [f"{one.uuid}  {one.name}  driver {one.driver_version}" for one in state.gpus]
    lines += [f"problem: {problem}" for problem in state.problems]
    answer: dict[str, Any] = {"ok": not state.problems, **msgspec.to_builtins(state)}
    return answer, "\n".join(lines) or "no GPU here", 1 if state.problems else 0


def _deliver(config: GpuConfig) -> None:
    courier = Courier(config)
    try:
        courier.deliver()
    finally:
        courier.close()


def _wipe(options: argparse.Namespace) -> Answer:
    from saw.gpu.wipe import verify, wipe_vm  # on a hypervisor alone; a workspace runs nothing of saw.vm
    from saw.vm import qemu
    from saw.vm.spec import load_spec
    from saw.vm.wiped import marker

    spec = load_spec(options.id)
    signers = signers_of(options)
    sealed = wipe_vm(spec, signers, options.reason, present, active=qemu.active)
    if options.out:
        write_atomic(Path(options.out), sealed)
    keys = {key_id(key): key for key in (signer.public_key() for signer in signers)}
    return _record(*verify(sealed, keys, workspace=spec.id), str(options.out or marker(spec)))


def _verify(options: argparse.Namespace) -> Answer:
    from saw.gpu.wipe import verify

    keys = {key_id(key): key for key in map(load_public_key, options.public)}
    return _record(*verify(read_file(options.record), keys, workspace=options.workspace), options.record)


def _record(found: WipeRecord, signers: tuple[str, ...], file: str) -> Answer:
    lines = [f"{found.workspace}: wiped on {found.host}, {found.ended.isoformat()}: {found.reason}"]
    lines += [
        f"{one.path}: {one.overwritten} bytes overwritten, {one.read_back} read back as zeros" for one in found.disks
    ]
    lines += [f"GPU {one.device}: {one.method}" for one in found.gpus]
    lines.append(f"signed by {', '.join(signers)}: {file}")
    return {"ok": True, "record": msgspec.to_builtins(found), "signers": [*signers], "file": file}, "\n".join(lines), 0


_COMMANDS = {"driver": _driver, "build": _build, "check": _check, "wipe": _wipe, "verify": _verify}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw gpu", description="GPUs of a workspace: driver, look, wipe.")
    commands = parser.add_subparsers(dest="command", required=True)
    driver = commands.add_parser("driver", help="look at the driver in this image or host; no GPU is needed")
    driver.add_argument("--root", type=Path, default=Path("/"), help="root tree to look at (default: this host)")
    driver.add_argument("--packages", action="store_true", help="look at packages and modprobe's configuration too")
    build = commands.add_parser("build", help="build and sign modules that are missing; the key on standard input")
    for sub in (driver, build):
        sub.add_argument("--certificate", required=True, help="certificate of the owner's key for modules")
    check = commands.add_parser("check", help="look whether the GPUs of this host are well")
    check.add_argument("--config", default=str(DEFAULT_CONFIG), help="configuration (default: %(default)s)")
    check.add_argument("--report", action="store_true", help="write the state and report what is newly wrong")
    wipe = commands.add_parser(
        "wipe", help="wipe disks and GPUs of a stopped VM (on its hypervisor), with a signed record"
    )
    wipe.add_argument("id", help="the workspace")
    wipe.add_argument("--reason", required=True, help="why; it stands in the record")
    wipe.add_argument("--out", help="write the record there as well")
    add_signing(wipe)
    verified = commands.add_parser("verify", help="verify the record of a wipe")
    verified.add_argument("record", help="the signed record")
    verified.add_argument("--public", action="append", required=True, help="public key that may sign; repeat for more")
    verified.add_argument("--workspace", default="", help="the workspace that it has to be of")
    for sub in commands.choices.values():
        sub.add_argument("--json", action="store_true", help="print JSON")
    return parser
