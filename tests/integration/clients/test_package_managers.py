"""pip, npm and apt inside the sandbox, against small indexes of ours."""

from __future__ import annotations

import pytest
from clients_packages import publish
from clients_rig import PYTHON, Workspace

APT = " ".join(
    f"-o {name}=$HOME/apt/{place}" for name, place in
    (("Dir::State", "state"), ("Dir::Cache", "cache"), ("Dir::Etc", ""), ("Dir::State::status", "status"))
)  # fmt: skip
"""Where an unprivileged apt keeps its own things."""


@pytest.fixture(autouse=True, scope="module")
def _published(workspace: Workspace) -> None:
    publish(workspace.far)


@pytest.mark.control("RUN-01")
def test_pip_installs_from_the_index_of_the_policy(workspace: Workspace) -> None:
    def pip(package: str) -> tuple[int, str]:
        done = workspace.client(
            PYTHON, "-B", "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", "--target", "/tmp/pip",
            package,
            variables={"PYTHONPATH": "/run/clients/python", "PIP_INDEX_URL": "https://pypi.example.com/simple"},
        )  # fmt: skip
        return done.code, done.words

    code, words = pip("demo-pkg")
    assert code == 0, words
    done = workspace.client(PYTHON, "-B", "-c", "import demo_pkg", variables={"PYTHONPATH": "/tmp/pip"})
    assert done.out == "hello from the wheel\n"
    code, words = pip("other-pkg")
    assert (code, "No matching distribution found" in words) == (1, True), words
    assert workspace.told() == ("method_or_path_not_allowed", "pypi.example.com")


@pytest.mark.control("RUN-01")
def test_npm_installs_from_the_registry_of_the_policy(workspace: Workspace) -> None:
    def npm(package: str) -> tuple[int, str]:
        install = "npm install --no-audit --no-fund --registry https://npm.example.com"
        done = workspace.client("sh", "-c", f"mkdir -p /tmp/npm && cd /tmp/npm && {install} {package}")
        return done.code, done.words

    code, words = npm("demo-pkg")
    assert code == 0, words
    assert workspace.client("node", "-e", "require('/tmp/npm/node_modules/demo-pkg')").out == "hello from npm\n"
    code, words = npm("other-pkg")
    assert (code, "403 Forbidden - GET https://npm.example.com/other-pkg - policy_denied" in words) == (1, True), words
    assert workspace.told() == ("method_or_path_not_allowed", "npm.example.com")


@pytest.mark.control("RUN-01")
def test_apt_fetches_from_the_archive_of_the_policy(workspace: Workspace) -> None:
    def apt(place: str) -> tuple[int, str]:
        done = workspace.client(
            "sh", "-ec",
            "mkdir -p ~/apt/state/lists/partial ~/apt/cache/archives/partial; touch ~/apt/status; cd /tmp; "
            f"echo 'deb [trusted=yes] https://apt.example.com/{place} ./' >~/apt/sources.list; "
            f"apt-get {APT} update; apt-get {APT} download demo; dpkg-deb --field demo_1.0_all.deb Package",
        )  # fmt: skip
        return done.code, done.words

    code, words = apt("debian")
    assert (code, "\ndemo\n" in words) == (0, True), words
    code, words = apt("private")
    assert (code, "403  Forbidden" in words) == (100, True), words
    assert workspace.told() == ("method_or_path_not_allowed", "apt.example.com")
