from __future__ import annotations

import atexit
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args

ROOT = Path(__file__).resolve().parents[3]
# The rigs that the services' own tests use: a real broker process, and a workspace's real policy agent.
sys.path[:0] = [str(ROOT / f"tests/{place}") for place in ("integration/broker", "integration/policyd", "unit/image")]


def install_collection() -> None:
    """Let ``import ansible_collections.secure_agent.workspace`` find this repository."""
    folder = Path(tempfile.mkdtemp(prefix="collection-"))
    link = folder / "ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sys.path.insert(0, str(folder))


install_collection()

from broker_rig import Lab  # noqa: E402


class Outcome(dict[str, Any]):
    """What a module printed, and whether it failed."""

    failed: bool


@pytest.fixture
def run_module() -> Callable[..., Outcome]:
    """Run a module's ``main()`` as Ansible would and return what it printed; its result must be what it documents."""

    def run(module: Any, *, check: bool = False, **arguments: Any) -> Outcome:
        output = io.StringIO()
        with (
            patch_module_args({**arguments, "_ansible_check_mode": check, "_ansible_diff": True}),
            redirect_stdout(output),
            pytest.raises(SystemExit) as ended,
        ):
            module.main()
        outcome = Outcome(json.loads(output.getvalue()))
        outcome.failed = bool(outcome.get("failed"))
        assert outcome.failed == (ended.value.code != 0)
        documented = {
            "changed",
            "diff",
            "invocation",
            "failed",
            "msg",
            "failure",
            "needs_archive",
            "warnings",
            *yaml.safe_load(module.RETURN),
        }
        assert set(outcome) <= documented, f"undocumented: {set(outcome) - documented}"
        return outcome

    return run


@pytest.fixture(scope="session")
def broker_context(tmp_path_factory: pytest.TempPathFactory):
    """A running broker with a registered image, and the context file that leads to it."""
    directory = Path(tempfile.mkdtemp(prefix="saw-plugins-"))
    lab = Lab(directory)
    context = tmp_path_factory.mktemp("context") / "context.json"
    context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
    try:
        lab.start()
        lab.register_image()
        lab.context = str(context)
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(directory)
