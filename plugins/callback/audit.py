# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What plays change, as OCSF events in a file that can be verified."""

from __future__ import annotations

DOCUMENTATION = r"""
name: audit
type: notification
short_description: Write each change and failure of a play as an OCSF event
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - One event (API Activity, JSON, one a line) for each task that changed a host, failed or did not reach it. The lines form a
    hash chain of the source C(ansible); C(saw audit verify --file) proves the file complete.
  - No output of a task is written, and of its arguments only those that O(arguments) names. Of a task with C(no_log) not even
    those.
  - It never ends a play. When an event cannot be written, a warning says so, once.
requirements:
  - The Python package C(secure-agent-workspace) for Ansible's own Python
  - It is switched on with C(callbacks_enabled=secure_agent.workspace.audit).
options:
  path:
    description: File that events are appended to; it is made with mode 0600. Several plays may share it.
    type: path
    default: ~/.local/state/saw/ansible-audit.jsonl
    env:
      - name: SAW_ANSIBLE_AUDIT
    ini:
      - section: callback_saw_audit
        key: path
  arguments:
    description:
      - Names of arguments whose values are written, when they are short texts, numbers or booleans.
      - A value that the module keeps out of its own log is not written either.
      - Modules tell their arguments only when they are asked to. From ansible-core 2.21 on that takes C(inject_invocation) in
        C(ansible.cfg).
    type: list
    elements: str
    default: [state]
    env:
      - name: SAW_ANSIBLE_AUDIT_ARGUMENTS
    ini:
      - section: callback_saw_audit
        key: arguments
"""

EXAMPLES = r"""
# ansible.cfg
# [defaults]
# callbacks_enabled = secure_agent.workspace.audit
# inject_invocation = true
# [callback_saw_audit]
# path = /var/log/saw/ansible.jsonl
# arguments = state, workspace
"""

import fcntl
import getpass
import os
import re
import socket
import uuid
from datetime import datetime, timezone
from typing import Any

from ansible.plugins.callback import CallbackBase

try:
    import msgspec
    from saw.audit import Chain, ChainedEvent, EventFactory, Head, Subject

    MISSING = False
except ImportError:
    MISSING = True

SOURCE = "ansible"
LONGEST = 256
LONGEST_LINE = 1024 * 1024
CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
HIDDEN = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"


class CallbackModule(CallbackBase):
    """Ansible's way to the file."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "secure_agent.workspace.audit"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run = str(uuid.uuid4())
        self._playbook = self._play = ""
        self._warned = False

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Remember the playbook's name."""
        self._playbook = os.path.basename(str(getattr(playbook, "_file_name", "")))

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Remember the play's name."""
        self._play = written_name(play)

    def v2_runner_on_ok(self, result: Any) -> None:
        """A task succeeded: it matters when it changed something."""
        if result.is_changed():
            self._write(result, "success")

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """A task failed."""
        self._write(result, "failure", ignored=bool(ignore_errors))

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """A host was not reached."""
        self._write(result, "failure", unreachable=True)

    def _write(self, result: Any, outcome: str, **more: bool) -> None:
        """Append one event; whatever goes wrong is a warning."""
        try:
            if MISSING:
                raise RuntimeError("Ansible's own Python lacks secure-agent-workspace; install it there")
            append(str(self.get_option("path")), self._event(result, outcome, more))
        except Exception as error:  # noqa: BLE001 - recording must not end the play
            if not self._warned:
                self._warned = True
                self._display.warning(f"secure_agent.workspace.audit: changes are not recorded: {error}")

    def _event(self, result: Any, outcome: str, more: dict[str, bool]) -> dict[str, Any]:
        task, host = result.task, result.host
        known = host.vars.get("saw_workspace")
        workspace = known.get("id", "") if isinstance(known, dict) else ""
        detail: dict[str, Any] = {
            "task": written_name(task),
            "play": self._play,
            "playbook": short(self._playbook),
            "host": short(host.name),
            "changed": result.is_changed(),
            "check_mode": bool(task.check_mode),
            **{name: value for name, value in more.items() if value},
        }
        hidden = bool(task.no_log) or bool(result.result.get("_ansible_no_log")) or "censored" in result.result
        if not hidden:
            detail["arguments"] = chosen(result.result, {str(name) for name in self.get_option("arguments")})
        else:
            detail["no_log"] = True
        subject = Subject(
            principal=f"user:{getpass.getuser()}",
            workspace=workspace,
            request_id=self._run,
            address=socket.gethostname(),
        )
        factory = EventFactory("ansible", host=socket.gethostname(), new_uid=lambda: str(uuid.uuid4()))
        return factory.api_activity(
            datetime.now(timezone.utc),
            subject,
            short(task.resolved_action or task.action),
            activity="update",
            outcome=outcome,
            message="a task changed a host" if outcome == "success" else "a task failed",
            resource=("host", short(host.name)),
            status_detail="" if hidden else code(result.result),
            detail=detail,
        )


def written_name(part: Any) -> str:
    """Return the name of a play or task as it is written in the playbook: what its templates gave may be secret."""
    written = part.get_ds()
    name = written.get("name") if isinstance(written, dict) else None
    return short(name or "")


def short(text: str) -> str:
    """Return the beginning of ``text``, as a plain string."""
    return str(text)[:LONGEST]


def chosen(result: Any, names: set[str]) -> dict[str, Any]:
    """Return the arguments of the module that are on the list and are short plain values."""
    invocation = result.get("invocation")
    given = invocation.get("module_args") if isinstance(invocation, dict) else None
    found: dict[str, Any] = {}
    for name, value in given.items() if isinstance(given, dict) else ():
        if name in names and isinstance(value, (str, int, bool)) and HIDDEN not in str(value):
            found[name] = value if isinstance(value, (int, bool)) else short(value)
    return found


def code(result: Any) -> str:
    """Return the code of a failure of our modules; never a message, which may quote anything."""
    failure = result.get("failure")
    found = failure.get("code") if isinstance(failure, dict) else None
    return str(found) if isinstance(found, str) and CODE.fullmatch(found) else ""


def append(path: str, event: dict[str, Any]) -> None:
    """Append ``event`` to the chain in ``path``; plays that share the file wait for each other."""
    path = os.path.expanduser(path)
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        chain = Chain(SOURCE, head(file))
        line = msgspec.json.encode(chain.append(event)) + b"\n"
        if file.write(line) != len(line):
            raise OSError(f"{path} took a part of an event only; is the disk full?")
        os.fsync(file.fileno())


def head(file: Any) -> Any:
    """Return the head of the chain, from the last line."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return None
    file.seek(max(0, size - LONGEST_LINE))
    lines = file.read().split(b"\n")
    if lines[-1]:
        raise ValueError(f"{file.name} ends within a line; move it away, a new one is begun")
    last = msgspec.json.decode(lines[-2], type=ChainedEvent)
    return Head(last.seq, last.hash)
