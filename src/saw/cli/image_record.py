"""``saw image record``: boot an image once and write the release record that officers sign."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from saw.cli.operator_options import fields, show
from saw.errors import ConfigError


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``saw image``."""
    record = commands.add_parser(
        "record", help="boot an image once and write its release record beside it; what is done for its bytes stays"
    )
    record.add_argument("directory", type=Path, help="the image's folder, build/images/NAME")
    record.add_argument(
        "--measured", type=Path, metavar="FILE",
        help="take this answer of `saw vm measure --json`, given on a hypervisor, instead of booting here",
    )  # fmt: skip
    record.add_argument("--again", action="store_true", help="boot it anew, such as after a change of the firmware")
    record.add_argument(
        "--baseline", type=Path, metavar="FILE",
        help="Lynis' report of a workspace on this image, in place of the build's own scan",
    )  # fmt: skip
    record.add_argument(
        "--patience", type=float, default=600.0, metavar="SECONDS", help="for one boot (default: %(default)s)"
    )
    record.add_argument("--json", action="store_true", help="print JSON")


def record(options: argparse.Namespace) -> int:
    """Write the record, or leave one that holds; progress goes to standard error."""
    from saw.baseline.report import read_report
    from saw.image.hardening import scored
    from saw.image.record import make_record

    baseline = None
    if options.baseline:
        report = read_report(options.baseline)
        baseline = (scored(report), options.baseline)
    made = make_record(
        options.directory.absolute(), _boot(options), lambda text: print(text, file=sys.stderr, flush=True),
        again=options.again or options.measured is not None, baseline=baseline,
    )  # fmt: skip
    answer = {
        "ok": True, "changed": made.changed, "booted": made.booted, "name": made.record["name"],
        "image_sha256": made.record["image_sha256"], "firmware_sha256": made.firmware_sha256, "file": made.file,
        "record": made.record,
    }  # fmt: skip
    told = {key: answer[key] for key in ("name", "image_sha256", "firmware_sha256", "file")}
    scan = made.record.get("baseline")
    told["hardening"] = f"{scan['score']} of 100 ({scan['scanner']} {scan['version']})" if scan else "not scored"
    show(answer, fields({**told, "boot": "booted now" if made.booted else "measured before"}), as_json=options.json)
    return 0


def _boot(options: argparse.Namespace) -> Callable[[Path], dict[str, Any]]:
    if options.measured is None:
        from saw.vm.measure import reference_boot

        return lambda image: reference_boot(image, patience=options.patience)
    from saw.image.record import answered

    try:
        told = answered(options.measured, options.measured.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {options.measured}: {error.strerror}", cure="name a readable file") from error
    return lambda _image: msgspec.to_builtins(told)
