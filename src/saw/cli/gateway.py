"""``saw gateway``: prepare, check and run ring 2 on a perimeter host."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from saw.errors import ConfigError
from saw.files import write_atomic, write_private
from saw.gateway.config import GatekeeperConfig, load_config
from saw.gateway.nft import render_nft
from saw.identity.sealed import KEY_BYTES

DEFAULT_CONFIG = "/etc/saw/gatekeeper.json"


def main(argv: list[str]) -> int:
    """Run ``saw gateway`` with ``argv`` and return its exit code."""
    parser = argparse.ArgumentParser(prog="saw gateway", description="Ring 2: the perimeter of governed workspaces.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", default=DEFAULT_CONFIG, help=f"configuration file (default {DEFAULT_CONFIG})")
    common.add_argument("--json", action="store_true", help="print machine-readable results")
    commands.add_parser("init", parents=[common], help="make folders, keys, signing requests and Envoy's first files")
    serving = commands.add_parser("serve", parents=[common], help="run saw-gatekeeper")
    serving.add_argument("--replica", type=int, default=1, help="which of the host's gatekeepers this is (default 1)")
    commands.add_parser(
        "status", parents=[common], help="tell how each gatekeeper of this host is; fails unless one decides"
    )
    render = commands.add_parser("render", parents=[common], help="print Envoy's files for some workspace numbers")
    render.add_argument("--numbers", default="1", help="workspace numbers, separated by commas (default 1)")
    render.add_argument("--check", action="store_true", help="have Envoy validate them instead of printing them")
    commands.add_parser("ports", parents=[common], help="tell which ports of ring 2 somebody else has (root)")
    commands.add_parser("nft", parents=[common], help="print the perimeter's nftables rules")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config)
    if arguments.command == "serve":
        from saw.gateway.service import serve

        if not 1 <= arguments.replica <= config.replicas:
            raise ConfigError(
                f"there is no replica {arguments.replica}: replicas is {config.replicas}",
                cure="start those that the configuration names, or raise `replicas` in it",
            )
        return serve(config, arguments.replica)
    if arguments.command == "status":
        from saw.gateway.replica_status import print_status

        return print_status(config, as_json=arguments.json)
    if arguments.command == "ports":
        from saw.gateway.ports import require_free

        require_free(config)
        print(json.dumps({"ok": True, "taken": {}}) if arguments.json else "all ports of ring 2 are free or its own")
        return 0
    if arguments.command == "nft":
        print(render_nft(
            config.nft.operator_networks, numbers=config.numbers, ingress_of=config.ring2.ingress_of,
            ssh_port=config.nft.ssh_port, bastion_port=config.nft.bastion_port,
        ), end="")  # fmt: skip
        return 0
    if arguments.command == "init":
        result = initialise(config)
        if arguments.json:
            print(json.dumps({"ok": True, **result}))
        else:
            print("\n".join(str(path) for path in result["changed"]) or "nothing to do")
        return 0
    return _render(config, [int(number) for number in arguments.numbers.split(",")], check=arguments.check)


def _render(config: GatekeeperConfig, numbers: list[int], *, check: bool) -> int:
    from saw.gateway.xds import XdsWriter, validate

    if strays := [number for number in numbers if number not in config.numbers]:
        raise ConfigError(
            f"this perimeter does not serve number {strays[0]}",
            cure=f"name numbers from {config.numbers.first} to {config.numbers.last}, or widen `numbers` in its configuration",
        )
    files = XdsWriter(config).render(numbers, ())
    if check:
        validate(config, files)
        print(f"Envoy accepts the configuration for {len(numbers)} workspaces")
        return 0
    print(json.dumps({name: json.loads(text) for name, text in files.items()}, indent=1))
    return 0


def initialise(config: GatekeeperConfig) -> dict[str, list[str]]:
    """Make what is missing and leave the rest: folders, the two key pairs with signing requests, bootstrap, empty xDS.

    Returns ``changed`` (paths written), ``csr`` (signing requests) and ``missing`` (certificates still to be installed).
    Existing workspaces keep their listeners: xDS files are only written where there are none.
    """
    from saw.gateway.xds import XdsWriter
    from saw.identity.x509 import new_key_and_csr

    changed: list[str] = []
    ring2 = config.ring2
    for folder, mode in (
        (config.state_dir, 0o700),
        (config.credentials_dir, 0o700),
        (config.key_file.parent, 0o755),
        (ring2.xds_dir, 0o755),
        (ring2.tls_dir, 0o755),
    ):
        if not folder.is_dir():
            folder.mkdir(parents=True, mode=mode)
            changed.append(str(folder))
    requests: list[str] = []
    for key_file, name, dns in (
        (config.key_file, config.name, ()),
        (ring2.tls_dir / "server.key", ring2.server_name, (ring2.server_name,)),
    ):
        csr_file = key_file.with_suffix(".csr")
        requests.append(str(csr_file))
        if not key_file.exists():
            key, csr = new_key_and_csr(name, dns)
            write_private(key_file, key)
            write_atomic(csr_file, csr)
            changed += [str(key_file), str(csr_file)]
    if config.records is not None and not config.records.key_file.exists():
        write_private(config.records.key_file, os.urandom(KEY_BYTES))
        changed.append(str(config.records.key_file))
    writer = XdsWriter(config)
    if writer.write_bootstrap():
        changed.append(str(ring2.xds_dir / "bootstrap.json"))
    if not (ring2.xds_dir / "lds.json").exists():
        changed += [str(ring2.xds_dir / name) for name in writer.write((), ())]
    certificates: tuple[Path, ...] = (config.cert_file, ring2.tls_dir / "server.pem", ring2.tls_dir / "ca.pem")
    return {"changed": changed, "csr": requests, "missing": [str(path) for path in certificates if not path.exists()]}
