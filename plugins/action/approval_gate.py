# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A play stops until people have approved this wave of it: states what will run, asks, waits, claims once."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from ansible import context
from ansible.errors import AnsibleActionFail
from ansible.module_utils.basic import missing_required_lib
from ansible.parsing.vault import EncryptedString, VaultedValue
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible.utils.vars import load_extra_vars

try:
    import msgspec
    from saw.broker.machine_client import asking_client
    from saw.errors import SawError
    from saw.review.asking import Question, new_claim
    from saw.review.gate import GateRefused, GateStatement, bound_variable, check_gate
    from saw.review.tree import bound_files
except ImportError as error:
    MISSING = error
    SawError = AnsibleActionFail
else:
    MISSING = None

SPEC = {
    "name": {"type": "str"},
    "purpose": {"type": "str"},
    "requested_by": {"type": "str"},
    "state": {"type": "str", "default": "approved", "choices": ["approved", "asked", "done", "failed"]},
    "hosts": {"type": "list", "elements": "str"},
    "paths": {"type": "list", "elements": "path"},
    "exclude": {"type": "list", "elements": "str", "default": [".git"]},
    "variables": {"type": "dict", "default": {}},
    "image": {"type": "str", "default": ""},
    "policy": {"type": "str", "default": ""},
    "id": {"type": "str"},
    "claim": {"type": "str", "no_log": False},
    "detail": {"type": "str", "default": ""},
    "timeout": {"type": "int", "default": 3600},
    "poll": {"type": "int", "default": 30},
    "context": {"type": "path"},
}
REQUIRED_IF = [
    ("state", "approved", ["name", "purpose"]),
    ("state", "asked", ["name", "purpose"]),
    ("state", "done", ["id", "claim"]),
    ("state", "failed", ["id", "claim"]),
]
#: Variables of this run that change what it does, bound when they are not as usual.
USUAL = {"ansible_run_tags": ["all"], "ansible_skip_tags": []}

SECRET = re.compile(r"passw|passphrase|secret|token|private_?key|api_?key", re.IGNORECASE)

display = Display()


class ActionModule(ActionBase):
    """Runs once for each batch of hosts, on the controller."""

    BYPASS_HOST_LOOP = True
    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False

    def run(self, tmp=None, task_vars=None):
        """Run the action."""
        result = super().run(tmp, task_vars)
        del tmp
        if MISSING is not None:
            raise AnsibleActionFail(missing_required_lib("secure-agent-workspace")) from MISSING
        wanted = self.validate_argument_spec(SPEC, required_if=REQUIRED_IF)[1]
        if not 1 <= wanted["poll"] <= 30 or not 0 <= wanted["timeout"] <= 30 * 86400:
            raise AnsibleActionFail("poll must be 1 to 30 seconds, timeout at most 30 days in seconds")
        try:
            for name, value in wanted["variables"].items():
                refuse_secrets(value, name)
            return result | self._gate(plain(wanted), task_vars or {})
        except SawError as error:
            failure = {"code": error.code, "details": error.details or {}, "cure": error.cure}
            return result | {"failed": True, "msg": str(error), "failure": failure}

    def _gate(self, wanted, task_vars):
        question = Question(asking_client(wanted["context"]), time.monotonic, time.sleep, self._tell)
        if wanted["state"] in {"done", "failed"}:
            return self._end(question, wanted)
        statement = self._state(wanted, task_vars)
        if self._task.check_mode:
            return previewed(question.preview(statement), statement)
        if wanted["id"] is None:
            view = question.ask(statement)
        else:
            view = question.view(wanted["id"])
        if wanted["state"] == "asked":
            return shown(view, changed=view.state == "pending")
        self._announce(view)
        claim = new_claim(os.urandom)
        view = question.agreed(
            view.id, claim, lambda: self._state(wanted, task_vars), wanted["timeout"], wanted["poll"]
        )
        display.display(f"approval_gate {view.gate}: {view.id} was approved by {', '.join(view.approved_by)}")
        return shown(view, changed=True) | {"claim": claim}

    def _end(self, question, wanted):
        before = question.view(wanted["id"])
        if self._task.check_mode:
            return shown(before, changed=before.state != wanted["state"])
        after = question.end(wanted["id"], wanted["claim"], wanted["state"], wanted["detail"])
        return shown(after, changed=before.state != after.state)

    def _state(self, wanted, task_vars):
        """Return the statement of this wave, as everything is now."""
        hosts = sorted(set(wanted["hosts"] or task_vars["ansible_play_batch"]))
        everyone = list(task_vars["ansible_play_hosts_all"])
        places = [everyone.index(name) + 1 for name in hosts if name in everyone]
        known = len(places) == len(hosts)
        base = Path(task_vars["playbook_dir"]).resolve()
        roots = [Path(self._loader.path_dwim(path)).resolve() for path in wanted["paths"] or [str(base)]]
        values = dict(wanted["variables"])
        values |= {
            name: list(task_vars[name]) for name, usual in USUAL.items() if list(task_vars.get(name, usual)) != usual
        }
        given = set(load_extra_vars(self._loader)) - set(values)
        stated = {
            "gate": wanted["name"],
            "purpose": wanted["purpose"],
            "requested_by": requester(wanted, task_vars),
            "playbook": " ".join(beside(base, Path(name).resolve()) for name in context.CLIARGS.get("args", ())),
            "first": min(places) if known else 1,
            "total": len(everyone) if known else len(hosts),
            "hosts": [{"name": name, "address": address(task_vars, name)} for name in hosts],
            "files": bound_files(
                [(path, "" if path == base else beside(base, path)) for path in roots], wanted["exclude"]
            ),
            "excluded": sorted(set(wanted["exclude"])),
            "variables": [bound_variable(name, plain(values[name])) for name in sorted(values)],
            "unbound": sorted(given),
            "image": wanted["image"],
            "policy": wanted["policy"],
        }
        try:
            statement = msgspec.convert(msgspec.to_builtins(plain(stated)), GateStatement)
        except msgspec.ValidationError as error:
            raise GateRefused(f"the statement is not valid: {error}", cure="correct the named option") from error
        check_gate(statement)
        return statement

    def _announce(self, view):
        where = view.url or f"saw review show {view.id}"
        display.display(
            f"approval_gate {view.gate}: {view.id} waits for {view.quorum} of {view.group} until {view.expires_at}: {where}"
        )

    def _tell(self, view, waited):
        if view is None:
            display.warning("the broker does not answer; it is asked again")
            return
        display.v(
            f"approval_gate {view.gate}: {view.id} is {view.state} after {int(waited)} s,"
            f" {len(view.approved_by)} of {view.quorum} approved: {view.url or f'saw review show {view.id}'}"
        )


def requester(wanted, task_vars):
    """Return the person who asks: as the task says, else whoever launched the job in AWX."""
    found = wanted["requested_by"] or task_vars.get("awx_user_email") or task_vars.get("awx_user_name")
    if not found:
        raise GateRefused("nobody is named who asks for this", cure="give requested_by; AWX names who launched the job")
    return str(found)


def address(task_vars, name):
    """Return where Ansible connects to for a host, empty when its name is all there is."""
    found = task_vars["hostvars"][name].get("ansible_host") if name in task_vars["hostvars"] else None
    return "" if found is None else str(found)


def beside(base, path):
    """Return a path relative to the playbook's folder when it is inside, else whole."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def refuse_secrets(value, name):
    """Refuse a variable that would show a secret to people: its name says so, or a part of it is marked as out of a vault."""
    if SECRET.search(name):
        raise GateRefused(
            f"the variable {name} has the name of a secret", cure="bind what is not secret, under another name"
        )
    if isinstance(value, EncryptedString) or VaultedValue.is_tagged_on(value):
        raise GateRefused(f"the variable {name} comes out of a vault", cure="bind what is not secret")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        refuse_secrets(item, name)


def plain(value):
    """Return data without Ansible's tags."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def shown(view, *, changed):
    """Return a result that tells how a question stands."""
    return {"changed": changed, **msgspec.to_builtins(view)}


def previewed(preview, statement):
    """Return the result of check mode: what would be asked, and the difference to the last approved statement."""
    told = msgspec.to_builtins(preview)
    before, after = told.pop("before"), told.pop("after")
    heads = {"before_header": "last approved statement", "after_header": "this statement"}
    return {
        "changed": preview.waiting is None,
        **told,
        "statement": msgspec.to_builtins(statement),
        "diff": {"before": before, "after": after, **heads},
    }
