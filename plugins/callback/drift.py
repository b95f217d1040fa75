# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a check run would change, and whom it could not ask, in a file for C(saw drift)."""

from __future__ import annotations

DOCUMENTATION = r"""
name: drift
type: notification
short_description: Write down what a check run would change
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - For C(saw drift check), which runs playbooks with C(--check) and switches this on by itself. It prints nothing.
  - At the end of a playbook one JSON file has each place that a task would change (host, play, role, task, module, and the path
    or name of the place), each host that was lost, each task that check mode cannot look at, and the hosts of each play.
  - No output, no difference and no value is written; of a task with C(no_log) not even the place.
requirements:
  - It is switched on with C(callbacks_enabled=secure_agent.workspace.drift).
options:
  path:
    description: The file; it is replaced at the end of each playbook, with mode 0600. Without it nothing is written.
    type: path
    default: ""
    env:
      - name: SAW_DRIFT_FILE
"""

EXAMPLES = r"""
# What saw drift check does for each playbook:
# SAW_DRIFT_FILE=/tmp/seen.json ANSIBLE_CALLBACKS_ENABLED=secure_agent.workspace.drift \
#   ansible-playbook -i inventory.yml --check --diff secure_agent.workspace.baseline
"""

import json
import os
import tempfile
from typing import Any

from ansible.playbook.handler import Handler
from ansible.plugins.callback import CallbackBase

SCHEMA = 1
LONGEST = 256
MOST_PLACES = 500
HIDDEN = "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER"
#: Arguments that say where a module works, the first that is there. Their values are paths and names, never contents.
PLACES = ("path", "dest", "name", "unit", "package", "key", "repo")


#: What the result of a task has that was skipped by its condition, or for want of items.
CONDITION = {"skip_reason", "skipped_reason", "false_condition"}


class CallbackModule(CallbackBase):
    """Ansible's way to the file."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "secure_agent.workspace.drift"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._playbook = ""
        self._begin()

    def _begin(self) -> None:
        self._plays: dict[str, dict[str, Any]] = {}
        self._play: dict[str, Any] = play_record("", began=True)
        self._changed: list[dict[str, Any]] = []
        self._lost: list[dict[str, Any]] = []
        self._blind: list[dict[str, Any]] = []

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Note every play, so that one which is never begun is missed."""
        self._begin()
        self._playbook = os.path.basename(str(getattr(playbook, "_file_name", "")))
        for play in playbook.get_plays():
            self._plays[id_of(play)] = play_record(written_name(play), began=False)

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Note the play's hosts: all of them, not only those of the batch that begins."""
        self._play = self._plays.setdefault(id_of(play), play_record(written_name(play), began=False))
        self._play["began"] = True
        inventory = play.get_variable_manager()._inventory  # noqa: SLF001 - there is no other way to it
        hosts = [host.name for host in inventory.get_hosts(play.hosts, ignore_restrictions=True)]
        self._play["hosts"] = sorted({*self._play["hosts"], *map(short, hosts)})

    def v2_runner_on_ok(self, result: Any) -> None:
        """A task succeeded: it is drift when it would have changed something."""
        self._saw(result)
        if isinstance(result.task, Handler) or not result.is_changed():
            return  # a handler only follows what was noted already
        items = result.result.get("results")
        changed = (
            [one for one in items if isinstance(one, dict) and one.get("changed")] if isinstance(items, list) else []
        )
        places: list[str] = []
        hidden = bool(result.task.no_log)
        for one in changed or [result.result]:
            if hidden or one.get("_ansible_no_log") or "censored" in one:
                hidden = True
            else:
                places += places_of(one)
        for place in list(dict.fromkeys(places))[:MOST_PLACES] or [""]:
            record = {**self._record(result), "place": place, "hidden": hidden, "applied": not result.task.check_mode}
            self._changed.append(record)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """A task failed: what comes after it on that host was not looked at."""
        self._saw(result)
        if not ignore_errors:
            self._lost.append({**self._record(result), "reason": "failed"})

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """A host was not reached."""
        self._saw(result)
        self._lost.append({**self._record(result), "reason": "unreachable"})

    def v2_runner_on_skipped(self, result: Any) -> None:
        """A task was skipped: by its condition, or because its module cannot be asked in check mode."""
        self._saw(result)
        items = result.result.get("results")
        for one in items if isinstance(items, list) and items else [result.result]:
            if isinstance(one, dict) and not CONDITION & {*one}:
                self._blind.append(self._record(result))
                return

    def v2_playbook_on_stats(self, _stats: Any) -> None:
        """Write the file."""
        path = str(self.get_option("path") or "")
        if not path:
            return
        plays = [{**play, "seen": sorted(play["seen"])} for play in self._plays.values()]
        found = {"changed": self._changed, "lost": self._lost, "blind": self._blind}
        try:
            replace(path, json.dumps({"schema": SCHEMA, "playbook": short(self._playbook), "plays": plays, **found}))
        except OSError as error:
            # the file is missing then, which no reader takes for a run without drift
            self._display.warning(f"secure_agent.workspace.drift: {path} was not written: {error.strerror}")

    def _saw(self, result: Any) -> None:
        self._play["seen"].add(short(result.host.name))

    def _record(self, result: Any) -> dict[str, Any]:
        task = result.task
        role = getattr(task, "_role", None)
        return {
            "host": short(result.host.name),
            "play": self._play["name"],
            "role": short(role.get_name(include_role_fqcn=False)) if role is not None else "",
            "task": written_name(task),
            "module": short(task.resolved_action or task.action),
        }


def id_of(play: Any) -> str:
    """Return what tells a play from others; the copy that runs has the same."""
    return str(play._uuid)  # noqa: SLF001 - plays have no other name of their own


def play_record(name: str, *, began: bool) -> dict[str, Any]:
    """Return what is noted of a play."""
    return {"name": name, "began": began, "hosts": [], "seen": set()}


def written_name(part: Any) -> str:
    """Return the name of a play or task as it is written in the playbook: what its templates gave may be secret."""
    written = part.get_ds()
    name = written.get("name") if isinstance(written, dict) else None
    return short(name or "")


def short(text: Any) -> str:
    """Return the beginning of ``text``, as a plain string."""
    return str(text)[:LONGEST]


def places_of(result: Any) -> list[str]:
    """Return the paths and names that a module would change, as far as its result tells."""
    found: list[Any] = []
    for one in listed(result.get("changes")):
        if isinstance(one, dict) and "target" in one:
            found.append(f"{one.get('kind', '')} {one['target']}".strip())
    found += listed(result.get("changed_files"))
    for unit in listed(result.get("units")):
        if isinstance(unit, dict):
            found += [f"{action} {unit.get('name', '')}" for action in listed(unit.get("actions"))]
    if not found:
        invocation = result.get("invocation")
        given = invocation.get("module_args") if isinstance(invocation, dict) else None
        for known in (given if isinstance(given, dict) else {}, result):
            names = next((known[key] for key in PLACES if known.get(key)), None)
            found = listed(names) if isinstance(names, list) else [names] if isinstance(names, str) else []
            if found:
                break
    if not found:
        headers = [one.get("before_header") for one in listed(result.get("diff")) if isinstance(one, dict)]
        found = [str(header).partition(" (")[0] for header in headers if str(header or "").startswith("/")]
    return [short(one) for one in found if isinstance(one, str) and one and HIDDEN not in one]


def listed(value: Any) -> list[Any]:
    """Return ``value`` when it is a list, a single dictionary as a list of one, else nothing."""
    return list(value) if isinstance(value, list) else [value] if isinstance(value, dict) else []


def replace(path: str, text: str) -> None:
    """Replace the file atomically, readable by its owner alone."""
    path = os.path.expanduser(path)
    descriptor, temporary = tempfile.mkstemp(prefix=".drift.", dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
