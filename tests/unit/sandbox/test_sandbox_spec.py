"""The sandbox that a policy compiles to."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from saw.policy.loader import load_governance, load_policy
from saw.runtime import sandbox, sandbox_home, sandbox_prepare, sandbox_units
from saw.runtime.sandbox import SandboxError, compile_spec
from saw.runtime.sandbox_units import compile_launch_files

ACCOUNT = (2000, 2000, "/home/agent")
POLICY = """
version: 1
filesystem_policy: {{include_workdir: true, read_only: [/usr, /etc/ssl{read_only}], read_write: [/tmp{read_write}]}}
landlock: {{compatibility: {compatibility}}}
process: {{run_as_user: agent, run_as_group: agent}}
"""
GOVERNANCE = """
schema: 1
blueprint: {{name: coding, version: 1.0.0, owner: team}}
landlock: {{minimum_abi: 6, allow_best_effort: {best_effort}}}
credentials:
  - id: {credential}
    ref: "local:git"
    hosts: ["git.example.com:443"]
    inject: {{header: Authorization, format: "Bearer {{secret}}"}}
mcp:
  servers:
    files:
      transport: stdio
      command: [mcp-server-filesystem, {directory}]
      tools: {{read_text_file: {{class: auto, args: {{path: {{under: {directory}}}}}}}}}
"""


def build(
    *,
    read_only="",
    read_write="",
    compatibility="hard_requirement",
    best_effort="false",
    credential="git-token",
    directory="/home/agent/project",
    account=ACCOUNT,
):
    policy = load_policy(
        POLICY.format(read_only=read_only, read_write=read_write, compatibility=compatibility).encode()
    )
    governance = load_governance(
        GOVERNANCE.format(best_effort=best_effort, credential=credential, directory=directory).encode()
    )
    return compile_spec(policy, governance, account=account)


@pytest.mark.control("CRED-01")
def test_environment_has_placeholders_and_proxy_only():
    spec = build()
    assert spec.environment["GIT_TOKEN"] == "openshell:resolve:env:GIT_TOKEN"
    for name in ("HTTP_PROXY", "https_proxy", "ALL_PROXY", "wss_proxy"):
        assert spec.environment[name] == "http://10.200.0.1:3128"
    assert (spec.environment["NODE_EXTRA_CA_CERTS"], spec.environment["GIT_SSL_CAINFO"]) == (
        sandbox.RING1_CA, sandbox.CA_BUNDLE,
    )  # fmt: skip


def test_programs_with_settings_of_their_own_get_the_same_proxy_and_authorities():
    spec = build()
    for name in ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "NPM_CONFIG_CAFILE", "PIP_CERT"):
        assert spec.environment[name] == sandbox.CA_BUNDLE
    java = dict(option.removeprefix("-D").split("=", 1) for option in spec.environment["JAVA_TOOL_OPTIONS"].split(" "))
    for scheme in ("http", "https"):
        assert f"http://{java[f'{scheme}.proxyHost']}:{java[f'{scheme}.proxyPort']}" == spec.environment["HTTP_PROXY"]
    assert (java["javax.net.ssl.trustStore"], java["javax.net.ssl.trustStoreType"]) == (sandbox.JAVA_TRUST, "PKCS12")
    placed = compile_launch_files(spec)
    assert spec.environment["APT_CONFIG"] == "/run/saw/sandbox/apt.conf"
    assert placed["apt.conf"].decode() == f'Acquire::https::CAInfo "{sandbox.CA_BUNDLE}";\n'


def test_credential_cannot_replace_a_variable():
    with pytest.raises(SandboxError, match="would replace the environment variable HTTP_PROXY"):
        build(credential="http-proxy")


@pytest.mark.control("RUN-02")
@pytest.mark.parametrize("path", ["/etc/shadow", "/root", "/var/lib/saw/x", "/sys/kernel", "/run/systemd"])
def test_host_secrets_cannot_be_listed(path):
    with pytest.raises(SandboxError, match="holds secrets or controls"):
        build(read_only=f", {path}")
    assert build(read_only=", /srv/data").read_only[-1] == "/srv/data"


@pytest.mark.control("RUN-02")
@pytest.mark.parametrize("path", ["/usr/local", "/etc", "/opt/saw", "/run/saw/sandbox", "/run", "/opt"])
def test_system_directories_cannot_be_writable(path):
    with pytest.raises(SandboxError):
        build(read_write=f", {path}")
    assert "/srv/scratch" in build(read_write=", /srv/scratch").read_write


@pytest.mark.control("RUN-03")
def test_root_is_refused():
    with pytest.raises(SandboxError, match="is root"):
        build(account=(0, 0, "/root"))
    assert build().uid == 2000


@pytest.mark.control("RUN-02")
def test_best_effort_needs_both_files():
    assert build(compatibility="best_effort").minimum_abi == 6
    assert build(best_effort="true").minimum_abi == 6
    assert build(compatibility="best_effort", best_effort="true").minimum_abi == 0


@pytest.mark.control("RUN-05")
def test_mcp_server_is_narrowed_and_never_wider_than_the_sandbox():
    spec = build()
    launch = spec.mcp_launch(spec.mcp_servers[0])
    assert launch.connect_ports == ()
    assert [p for p in launch.read_write if p.startswith("/home")] == ["/home/agent/project"]
    assert "/run/saw/shell" not in launch.read_write
    with pytest.raises(SandboxError, match="which the sandbox itself may not reach"):
        build(directory="/srv/other")


@pytest.mark.control("GPU-01")
def test_a_gpu_is_in_the_main_sandbox_alone_and_only_when_granted():
    granted = build(read_write=", /dev/nvidia0, /dev/nvidiactl")
    assert granted.devices == ("/dev/nvidia0", "/dev/nvidiactl")
    assert [p for p in granted.read_write if p.startswith("/dev")] == []
    launch = granted.shell_launch()
    assert {"/dev/nvidia0", "/dev/nvidiactl", "/dev/null"} <= set(launch.devices)
    unit = sandbox_units.shell_unit(granted)
    assert "\nBindPaths=-/dev/nvidia0\nDeviceAllow=/dev/nvidia0 rw\n" in unit
    other = {name: text for name, text in sandbox_units.compile_units(granted).items() if name != "saw-shell.service"}
    assert not [name for name, text in other.items() if "nvidia" in text]
    assert not [p for p in granted.mcp_launch(granted.mcp_servers[0]).devices if "nvidia" in p]
    without = build()
    assert without.devices == ()
    assert "nvidia" not in sandbox_units.shell_unit(without)
    assert not [p for p in without.shell_launch().devices if "nvidia" in p]


@pytest.mark.control("RUN-04")
def test_places_that_start_again_are_protected_when_home_is_writable():
    spec = build(read_write=", /home/agent")
    assert {"/home/agent/.bashrc", "/home/agent/.ssh", "/home/agent/.config/systemd"} <= set(spec.protected)
    assert build().protected == ()
    unit = sandbox_units.shell_unit(spec)
    assert "BindReadOnlyPaths=/home/agent/.bashrc" in unit


@pytest.mark.control("RUN-04")
def test_what_lies_around_a_protected_place_cannot_be_moved_aside():
    unit = sandbox_units.shell_unit(build(read_write=", /home/agent"))
    assert "\nBindPaths=/home/agent/.config\n" in unit
    assert unit.index("BindPaths=/home/agent/.config\n") < unit.index("BindReadOnlyPaths=/home/agent/.config/systemd")
    assert unit.count("BindPaths=/home/agent\n") == 1
    assert "BindPaths=/home/agent/.config" not in sandbox_units.shell_unit(build())


def test_the_coding_blueprint_compiles():
    spec = sandbox.load_spec(Path(__file__).parents[3] / "policies" / "coding", account=ACCOUNT)
    units = sandbox_units.compile_units(spec)
    assert "InaccessiblePaths=-/etc/shadow" in units["saw-shell.service"]


def test_missing_generation_names_the_cure(tmp_path):
    with pytest.raises(SandboxError, match="saw-policyd"):
        sandbox.load_spec(tmp_path, account=ACCOUNT)


def test_shims_converge(tmp_path):
    paths = sandbox.RuntimePaths()
    assert len(sandbox_prepare.write_shims(tmp_path, paths)) == 7
    assert sandbox_prepare.write_shims(tmp_path, paths) == []
    assert (tmp_path / "saw-run").stat().st_mode & 0o777 == 0o755


@pytest.mark.control("RUN-04")
def test_protected_places_become_roots_and_links_are_not_followed(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("changing owners needs root")
    home = tmp_path / "home"
    (home / ".config").mkdir(parents=True)
    (home / ".bashrc").write_text("evil")
    victim = tmp_path / "victim"
    victim.mkdir()
    for path in (home, home / ".config", home / ".bashrc"):
        os.chown(path, 2000, 2000)
    spec = replace(build(), home=str(home), read_write=(str(home),))
    assert str(home / ".bashrc") in sandbox_home.protect_home(spec)
    assert (home / ".bashrc").read_bytes() == b""
    assert (home / ".bashrc").stat().st_uid == 0
    assert (home / ".bashrc.saw-replaced").read_text() == "evil"
    assert sandbox_home.protect_home(spec) == []
    (home / ".config").rename(home / "moved")
    (home / ".config").symlink_to(victim)
    with pytest.raises(SandboxError, match="cannot be prepared"):
        sandbox_home.protect_home(spec)
    assert list(victim.iterdir()) == []
