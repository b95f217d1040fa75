"""``saw image``: register and list release records of golden images."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from saw.broker.client import OperatorClient
from saw.cli.operator_options import add_options, fields, show, table
from saw.errors import ConfigError


def main(argv: list[str]) -> int:
    """Run ``saw image register`` or ``saw image list``."""
    parser = argparse.ArgumentParser(prog="saw image", description="Release records of golden images.")
    commands = parser.add_subparsers(dest="command", required=True)
    register = commands.add_parser("register", help="register a release record, so that workspaces may boot the image")
    register.add_argument("record", help="<image>.release.json")
    add_options(register)
    add_options(commands.add_parser("list", help="list registered images"))
    options = parser.parse_args(argv)
    client = OperatorClient.from_context(options.context)
    if options.command == "list":
        answer = client.request("GET", "/v1/images")
        rows = [{**row, "image_sha256": row["image_sha256"][:16]} for row in answer["images"]]
        show(answer, table(rows, ("name", "image_sha256", "created", "registered_at")), as_json=options.json)
        return 0
    try:
        record = msgspec.json.decode(Path(options.record).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{options.record} is no release record: {error}", cure="pass the image's .release.json"
        ) from error
    answer = client.request("PUT", "/v1/images", record)
    show(answer, fields(answer), as_json=options.json)
    return 0
