"""The role runtime_openshell: what it refuses, and its files as they are rendered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jinja2
import pytest
import yaml
from ansible.plugins.filter.core import FilterModule

from saw.files import load_json
from saw.runtime.decide import DecideConfig
from saw.runtime.openshell import OpenShellConfig, config_of
from saw.runtime.openshell_host import ACCOUNT, RANGE, lacks
from saw.runtime.sandbox import PROXY_ADDRESS, PROXY_PORT

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles/runtime_openshell"
IMAGES = {
    f"runtime_openshell_{name}": f"registry.example.com/{name}@sha256:{digit * 64}"
    for name, digit in (("image", "a"), ("sandbox_image", "b"), ("supervisor_image", "c"))
}
pytestmark = pytest.mark.control("INT-01")

#: Keys of gateway.toml (schema 2) that OpenShell's public documents, examples and tests of 0.1.x show.
KEYS = {
    "openshell": {"version"},
    "openshell.gateway": {"bind_address", "log_level", "compute_driver", "policy_validation_failure_mode"},
    "openshell.gateway.tls": {"cert_path", "key_path", "client_ca_path"},
    "openshell.gateway.mtls_auth": {"enabled"},
    "openshell.gateway.auth": {"allow_unauthenticated_users"},
    "openshell.drivers.podman": {
        "socket_path", "default_image", "sandbox_runtime_image", "supervisor_image", "image_pull_policy",
        "enable_bind_mounts", "allow_driver_config", "sandbox_pids_limit", "health_check_interval_secs", "https_proxy",
        "proxy_connect_by_hostname", "proxy_ca_bundle",
    },
}  # fmt: skip


def render(name: str, role: Path = ROLE, **variables: object) -> str:
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text())
    environment = jinja2.Environment(  # noqa: S701 - configuration files, no HTML
        loader=jinja2.FileSystemLoader(role / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(FilterModule().filters())
    return environment.get_template(name).render({**defaults, "ansible_managed": "by a test", **IMAGES, **variables})


def test_the_gateways_file_says_only_what_the_public_schema_knows():
    found = {}

    def walk(table, name):
        for key, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{name}.{key}".lstrip("."))
            else:
                found.setdefault(name, {})[key] = value

    walk(tomllib.loads(render("gateway.toml.j2")), "")
    assert {name: set(keys) for name, keys in found.items()} == KEYS
    driver = found["openshell.drivers.podman"]
    assert (
        driver["https_proxy"] == f"http://{PROXY_ADDRESS}:{PROXY_PORT}" and driver["proxy_connect_by_hostname"] is True
    )
    assert (driver["image_pull_policy"], driver["enable_bind_mounts"], driver["allow_driver_config"]) == (
        "never",
        False,
        False,
    )
    gateway = found["openshell.gateway"]
    assert gateway["bind_address"] == OpenShellConfig(image=IMAGES["runtime_openshell_image"]).endpoint
    assert gateway["policy_validation_failure_mode"] == "fail_closed"
    assert found["openshell.gateway.auth"]["allow_unauthenticated_users"] is False
    assert found["openshell.gateway.mtls_auth"]["enabled"] is True


def test_the_handovers_file_is_what_its_program_reads():
    accept = ["governance.persistence"]
    config = config_of(render("openshell.json.j2", runtime_openshell_accept=accept).encode(), "openshell.json")
    assert config.image == IMAGES["runtime_openshell_image"] and config.accept == tuple(accept)
    gateway = tomllib.loads(render("gateway.toml.j2"))["openshell"]["gateway"]
    assert gateway["tls"]["client_ca_path"] == f"{config.tls}/ca.crt"


@pytest.mark.parametrize(("callers", "netns"), [("sandbox", DecideConfig().netns), ("vm", "/proc/1/ns/net")])
def test_ring_1_looks_for_callers_where_the_runtime_is(tmp_path, callers, netns):
    file = tmp_path / "decide.json"
    file.write_text(render("decide.json.j2", ROOT / "roles/egress", egress_callers=callers))
    assert load_json(file, DecideConfig).netns == netns
    assert ("netns" in json.loads(file.read_text())) is (callers == "vm"), "by default the file is as it was"


def test_systemd_takes_the_units(tmp_path):
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in ("sysinit.target", "basic.target", "multi-user.target", "shutdown.target", "system.slice", "-.slice"):
        (units / name).write_text("[Unit]\nDescription=of the test\n")
    (units / "saw-sandbox-net.service").write_text("[Service]\nExecStart=/usr/bin/podman\n")
    for program in ("usr/bin/podman", "usr/bin/openshell-gateway", "bin/sh", "opt/saw/bin/saw"):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    names = [
        "saw-openshell-podman.service",
        "saw-openshell.service",
        "saw-openshell-apply.service",
        "saw-openshell-apply.path",
    ]
    for name in names:
        (units / name).write_text(render(f"{name}.j2"))

    def verify() -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", *names]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    good = verify()
    assert good.returncode == 0, good.stderr
    (units / names[1]).write_text(render(f"{names[1]}.j2").replace("Restart=on-failure", "Restart=when-it-rains"))
    assert "when-it-rains" in verify().stderr
    text = render(f"{names[1]}.j2")
    assert all(f"podman image exists {image}" in text for image in IMAGES.values())


BAD = {
    "good": {},
    "no package": {"runtime_openshell_package": ""},
    "two packages": {"runtime_openshell_deb": "a.deb"},
    "no digest": {"runtime_openshell_package": "", "runtime_openshell_deb": "a.deb"},
    "an image by its tag": {"runtime_openshell_supervisor_image": "registry.example.com/supervisor:latest"},
    "too many tasks": {"runtime_openshell_tasks": 100000},
    "ids of people": {"runtime_openshell_first_id": 1000},
}


@pytest.mark.thorough
def test_what_cannot_work_is_refused_before_anything_is_changed(tmp_path):
    plays = []
    for name, variables in BAD.items():
        told = {"name": name, "msg": "{{ ansible_failed_result.results | map(attribute='msg') | join(' ') }}"}
        plays.append(
            {
                "hosts": "localhost",
                "gather_facts": False,
                "vars": {
                    **yaml.safe_load((ROLE / "defaults/main.yml").read_text()),
                    **IMAGES,
                    "runtime_openshell_package": "openshell",
                    **variables,
                },
                "tasks": [
                    {
                        "block": [{"ansible.builtin.include_tasks": str(ROLE / "tasks/preflight.yml")}],
                        "rescue": [
                            {
                                "ansible.builtin.copy": {
                                    "content": json.dumps(told),
                                    "dest": str(tmp_path / f"{name}.json"),
                                }
                            }
                        ],
                    }
                ],
            }
        )
    (tmp_path / "play.yml").write_text(yaml.safe_dump(plays))
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", "-c", "local", tmp_path / "play.yml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "ANSIBLE_PYTHON_INTERPRETER": sys.executable, "ANSIBLE_LOCALHOST_WARNING": "false"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = {path.stem: json.loads(path.read_text())["msg"] for path in tmp_path.glob("*.json")}
    assert told.keys() == BAD.keys() - {"good"}
    assert "and not from both" in told["no package"] and "and not from both" in told["two packages"]
    assert "64 hexadecimal digits" in told["no digest"]
    assert "registry.example.com/supervisor:latest" in told["an image by its tag"]
    assert "64 to 4096" in told["too many tasks"] and "100000 or more" in told["ids of people"]


# ---------------------------------------------------------------- the host


@pytest.fixture
def host(tmp_path):
    """A host's tree that offers everything."""
    for name in ("openshell-gateway", "newuidmap", "pasta"):
        (tmp_path / "usr/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "usr/bin" / name).write_text("")
    podman(tmp_path, "echo podman version 5.4.2")
    files = {
        "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
        "proc/sys/user/max_user_namespaces": "1000\n",
        "etc/subuid": f"other:100000:65536\n{ACCOUNT}:1000000:{RANGE}\n",
        "etc/subgid": f"{ACCOUNT}:1000000:{RANGE}\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def podman(host: Path, does: str) -> None:
    (host / "usr/bin/podman").write_text(f"#!/bin/sh\n{does}\n")
    (host / "usr/bin/podman").chmod(0o755)


def test_a_host_that_offers_everything_lacks_nothing(host):
    assert lacks(host, abi=6) == []


@pytest.mark.parametrize(
    ("change", "thing", "words"),
    [
        (lambda host: (host / "usr/bin/podman").unlink(), "/usr/bin/podman", "there is no container runtime"),
        (lambda host: podman(host, "echo podman version 4.9.3"), "podman", "it is version 4"),
        (lambda host: podman(host, "echo broken >&2; exit 1"), "podman", "broken"),
        (lambda host: (host / "usr/bin/pasta").unlink(), "/usr/bin/pasta", "not installed"),
        (lambda host: (host / "usr/bin/openshell-gateway").unlink(), "/usr/bin/openshell-gateway", "not installed"),
        (lambda host: (host / "sys/fs/cgroup/cgroup.controllers").unlink(), "/sys/fs/cgroup", "cgroup v2"),
        (
            lambda host: (host / "sys/fs/cgroup/cgroup.controllers").write_text("cpu\n"),
            "/sys/fs/cgroup",
            "memory, pids",
        ),
        (
            lambda host: (host / "proc/sys/user/max_user_namespaces").write_text("0\n"),
            "user.max_user_namespaces",
            "off",
        ),
        (lambda host: (host / "etc/subgid").write_text(f"{ACCOUNT}:1:10\n"), "/etc/subgid", "fewer than"),
    ],
)
def test_each_lack_is_named_with_its_cure(host, change, thing, words):
    change(host)
    found = lacks(host, abi=6)
    assert [one.thing for one in found] == [thing]
    assert words in found[0].reason and found[0].cure


def test_a_kernel_without_landlock_and_an_environment_without_the_sdk_are_lacks(host):
    assert [one.thing for one in lacks(host, abi=0)] == ["landlock"]
    assert [one.thing for one in lacks(host, abi=6, sdk="openshell_that_nobody_made")] == ["openshell_that_nobody_made"]
