#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One component on one host: its files and its units, in one step that holds as a whole or leaves the old state."""

from __future__ import annotations

DOCUMENTATION = r"""
module: component
short_description: Install one component's files and bring its units to the wanted state
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Every new content is checked with its own tool before any file is replaced, each file is replaced atomically, and the units
    that use them are restarted in the same step. A play that stops half-way can therefore not leave new files with an old
    process.
  - What a replaced file still owes to the host, namely O(files[].apply) and a reload of systemd, is noted under
    C(/var/lib/saw/component) before the file is replaced and struck out when it was done. A run that was killed in between
    leaves the note, and the next one does what it owes, although the file looks right.
  - A unit is also restarted when it has been running since before one of the files, or one of O(watch), was last written.
  - Where systemd is not running (an image that is being built in a chroot), units are enabled and nothing is started.
  - Needs nothing but Python's standard library on the host.
attributes:
  check_mode:
    support: full
    description: Reports what would change; runs the checks of new content too, where the host has what O(needs) lists.
  diff_mode:
    support: full
    description: Shows each file's difference, except the content of O(files[].secret_base64).
  idempotent:
    support: full
    description: A second run changes nothing.
options:
  files:
    description: Files in the order in which they are written.
    type: list
    elements: dict
    default: []
    suboptions:
      dest:
        description: Absolute path on the host. Missing parent directories are made, owned by root with mode 0755.
        type: path
        required: true
      content:
        description: The file's whole content.
        type: str
      secret_base64:
        description:
          - The same for content that must not be shown anywhere, in base64.
          - Ansible writes the arguments of a call into the host's log and takes secrets out of it, which it does not find there
            when they have a line break or another character that is written as an escape. Base64 has none.
        type: str
      mode:
        description: Permission bits, in octal.
        type: str
        default: "0644"
      owner:
        description: Owning account.
        type: str
        default: root
      group:
        description: Owning group.
        type: str
        default: root
      validate:
        description:
          - Command that must succeed before the file is replaced; C(%s) stands for the new content in a private folder, under its
            own file name and beside the other new files of the same folder.
          - It runs in check mode too, so it must change nothing.
        type: list
        elements: str
        default: []
      lines:
        description:
          - For files whose reader has no way to try one. Regular expressions; each line that is neither empty nor a comment
            (C(#)) has to be one of these forms as a whole, or no file is replaced.
        type: list
        elements: str
        default: []
      apply:
        description: Command that runs right after the file was replaced, before the next one is written. When it fails, the old
          content comes back, and the next run calls it again for what lies there then.
        type: list
        elements: str
        default: []
  exclusive:
    description: Folders in which no other file than the listed ones may lie; others are removed.
    type: list
    elements: path
    default: []
  units:
    description: systemd units in the order in which they are handled.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Full name of the unit.
        type: str
        required: true
      enabled:
        description: Whether it starts at boot. Absent leaves this alone, as a unit without an install section needs; to enable
          such a unit is an error.
        type: bool
      state:
        description:
          - V(started) starts it, and restarts it when something it uses has changed; a unit whose conditions do not hold stays
            inactive and that is no error.
          - V(reloaded) is the same with a reload in place of a restart.
          - V(present) touches it only when it already runs.
          - V(stopped) stops it.
        type: str
        choices: [started, reloaded, present, stopped]
        default: started
  needs:
    description:
      - Files without which the checks of new content cannot work, for example the program that a unit starts.
      - One that is missing is an error that names it. In check mode an earlier step may have to bring it, so there the checks
        are left out and the files are listed in RV(unchecked).
    type: list
    elements: path
    default: []
  watch:
    description: Other files whose change needs a restart, for example the installed runtime.
    type: list
    elements: path
    default: []
"""

EXAMPLES = r"""
- name: Install the broker
  secure_agent.workspace.component:
    files:
      - dest: /etc/systemd/system/saw-broker.service
        content: "{{ lookup('ansible.builtin.template', 'saw-broker.service.j2') }}"
        validate: [systemd-analyze, verify, --man=no, "%s"]
    units:
      - name: saw-broker.service
        enabled: true
    needs: [/opt/saw/bin/saw]
    watch: [/opt/saw/requirements.txt]
"""

RETURN = r"""
changed_files:
  description: Paths whose content, mode or owner changed (or would change), or whose O(files[].apply) an earlier run owed.
  type: list
  elements: str
  returned: success
  sample: [/etc/saw/broker.json]
unchecked:
  description: Paths whose new content was not checked, since something of O(needs) is missing; in check mode alone.
  type: list
  elements: str
  returned: success
  sample: []
booted:
  description: Whether systemd runs on this host.
  type: bool
  returned: success
  sample: true
units:
  description: What was found and done for each unit.
  type: list
  elements: dict
  returned: success
  sample: [{name: saw-broker.service, enabled: true, active: active, conditions: true, actions: [restart]}]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: unit_failed, details: {unit: saw-broker.service}, cure: read its journal}
"""

import hashlib
import os
import re
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.managed_file import (
    ComponentError,
    ManagedFile,
)
from ansible_collections.secure_agent.workspace.plugins.module_utils.systemd_time import started_at

STATE = "/var/lib/saw/component"
BOOTED = "/run/systemd/system"
ROOT = "/"
#: systemctl's words (is-enabled) for a unit that starts at every boot, and for one that no `enable` can change.
ENABLED = {"enabled", "alias"}
FIXED = {"static", "indirect", "generated", "transient"}


class Notes:
    """What earlier runs still owe to the host, one small file each; written before the deed that creates the debt."""

    @staticmethod
    def place(kind: str, path: str = "") -> str:
        """Where the note of this kind about ``path`` lies."""
        return os.path.join(STATE, f"{kind}-{hashlib.sha256(path.encode()).hexdigest()[:16]}" if path else kind)

    def owed(self, kind: str, path: str = "") -> bool:
        """Whether there is such a note."""
        return os.path.exists(self.place(kind, path))

    def write(self, kind: str, path: str = "") -> None:
        """Make the note last over a crash; a second time renews its date."""
        os.makedirs(STATE, mode=0o755, exist_ok=True)
        with open(self.place(kind, path), "w", encoding="utf-8") as stream:
            stream.write(f"{path or kind}\n")
            stream.flush()
            os.fsync(stream.fileno())
        folder = os.open(STATE, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def strike(self, kind: str, path: str = "") -> None:
        """Take the note away, and the folder with the last one, so that an image keeps nothing of its build."""
        if self.owed(kind, path):
            os.unlink(self.place(kind, path))
            if not os.listdir(STATE):
                os.rmdir(STATE)


class Units:
    """The units of the component, through systemctl."""

    def __init__(self, module: AnsibleModule, notes: Notes) -> None:
        self.module = module
        self.notes = notes
        self.booted = os.path.isdir(BOOTED)
        self.offline = [] if self.booted else [f"--root={ROOT}"]

    def systemctl(self, *arguments: str, check: bool = True) -> tuple[int, str, str]:
        """Run systemctl; raise :class:`ComponentError` on failure when ``check``."""
        code, out, err = self.module.run_command(["systemctl", *arguments])
        if check and code != 0:
            raise ComponentError(
                f"systemctl {' '.join(arguments)} failed: {(err or out).strip()}",
                "systemctl_failed",
                "read the message; `systemctl status` on the host tells more",
                command=["systemctl", *arguments],
            )
        return code, out.strip(), err.strip()

    def enablement(self, name: str) -> str:
        """What systemctl(1) calls the unit's state: enabled, disabled, static, linked, masked, …; empty for an unknown unit."""
        return (self.systemctl(*self.offline, "is-enabled", name, check=False)[1].splitlines() or [""])[0].strip()

    def reload_manager(self) -> None:
        """Let systemd read the unit files again, and strike out that this was owed."""
        if self.booted:
            self.systemctl("daemon-reload")
        self.notes.strike("daemon-reload")

    def show(self, name: str) -> dict[str, str]:
        """The properties that the decisions need."""
        names = (
            "LoadState,ActiveState,SubState,ConditionResult,NeedDaemonReload,ActiveEnterTimestamp,StateChangeTimestamp"
        )
        out = self.systemctl("show", "--timestamp=us+utc", f"--property={names}", name)[1]
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def handle(self, unit: dict[str, Any], newest: float, *, check: bool, unsettled: bool) -> dict[str, Any]:
        """Bring one unit to its state.

        ``newest`` is when the youngest thing it uses was written (seconds, Unix time). ``unsettled`` says that unit files would
        be written first, so that what systemd knows of the unit is no forecast.
        """
        name, state = unit["name"], self.enablement(unit["name"])
        report: dict[str, Any] = {
            "name": name,
            "actions": [],
            "enabled": state in ENABLED,
            "active": "",
            "conditions": True,
        }
        if unit["enabled"] and state in FIXED and not unsettled:
            raise ComponentError(
                f"{name} cannot be enabled: it is {state}, it has no install section of its own",
                "unit_not_enableable",
                "leave `enabled` out, give the unit an [Install] section, or name the unit that pulls it in",
                unit=name,
                state=state,
            )
        if unit["enabled"] is not None and unit["enabled"] != report["enabled"]:
            verb = "enable" if unit["enabled"] else "disable"
            report["actions"].append(verb)
            report["enabled"] = unit["enabled"]
            if not check:
                self.systemctl(*self.offline, verb, name)
        if not self.booted:
            return report
        before = self.show(name)
        report["active"] = before.get("ActiveState", "")
        verb = self.wanted_verb(unit["state"], before, newest)
        if before.get("NeedDaemonReload") == "yes" and not check:
            self.reload_manager()
        if verb is None:
            return report
        if check:
            # Only a real start shows whether the unit's conditions hold; what they answered last time is the best forecast.
            if not (
                verb == "start"
                and before.get("ConditionResult") == "no"
                and before.get("ActiveEnterTimestamp", "") == ""
                and self.tried(name)
            ):
                report["actions"].append(verb)
            return report
        self.run(verb, name)
        after = self.show(name)
        report["active"] = after.get("ActiveState", "")
        report["conditions"] = after.get("ConditionResult") != "no"
        if verb != "start" or report["active"] != before.get("ActiveState"):
            report["actions"].append(verb)
        return report

    def tried(self, name: str) -> bool:
        """Whether systemd has looked at the unit's conditions since the host booted."""
        out = self.systemctl("show", "--property=ConditionTimestampMonotonic", "--value", name)[1]
        return out not in ("", "0")

    @staticmethod
    def wanted_verb(state: str, found: dict[str, str], newest: float) -> str | None:
        """What systemctl has to do, or None."""
        running = found.get("ActiveState") in {"active", "activating", "reloading"}
        if state == "stopped":
            return "stop" if running else None
        if not running:
            return None if state == "present" else "start"
        # A reload changes the state for a moment, yet leaves the start time as it was.
        since = found.get("StateChangeTimestamp" if state == "reloaded" else "ActiveEnterTimestamp", "")
        if found.get("NeedDaemonReload") == "yes" or newest > started_at(since):
            return "reload-or-restart" if state == "reloaded" else "restart"
        return None

    def run(self, verb: str, name: str) -> None:
        """Start, restart, reload or stop; a failure carries the end of the unit's journal."""
        if verb in {"start", "restart"}:
            self.systemctl("reset-failed", name, check=False)
        code, out, err = self.systemctl(verb, name, check=False)
        if code == 0:
            return
        journal = self.module.run_command(["journalctl", "--no-pager", "--output=cat", "--lines=25", f"--unit={name}"])[
            1
        ]
        raise ComponentError(
            f"{name} could not be brought up ({verb}): {(err or out).strip()}; its journal ends with:\n{journal[-3000:]}",
            "unit_failed",
            "correct what the journal names, then run the play again",
            unit=name,
            verb=verb,
        )


def other_line(content: str, forms: list[str]) -> tuple[int, str] | None:
    """Return the first line of ``content``, with its number, that is neither empty nor a comment and has none of ``forms``.

    Raises ``re.error`` for a form that is no regular expression.
    """
    wanted = [re.compile(form) for form in forms]
    for number, line in enumerate(content.split("\n"), 1):
        if line and not line.startswith("#") and not any(form.fullmatch(line) for form in wanted):
            return number, line
    return None


def refuse_other_lines(file: ManagedFile) -> None:
    """Raise :class:`ComponentError` for the first line of new content that has none of the forms that were named."""
    if not file.lines or not file.content_changes:
        return
    try:
        found = other_line(file.content.decode(errors="replace"), file.lines)
    except re.error as error:
        raise ComponentError(
            f"{file.dest}: lines has {error.pattern!r}, which is no regular expression: {error}",
            "lines_malformed",
            "correct it; no file was replaced",
            dest=file.dest,
        ) from error
    if found:
        number, line = found
        raise ComponentError(
            f"{file.dest}: line {number} has none of the forms allowed there: {'(secret)' if file.secret else repr(line[:200])}",
            "content_refused",
            "correct the template or the variable behind the named line; no file was replaced",
            dest=file.dest,
        )


def validate(module: AnsibleModule, files: list[ManagedFile]) -> list[str]:
    """Run every file's check on its new content before anything is replaced; return the paths that could not be checked.

    Files of one folder are staged in one folder too, since units refer to each other by name.
    """
    for file in files:
        refuse_other_lines(file)
    checked = [file for file in files if file.validate and file.content_changes]
    missing = [path for path in module.params["needs"] if not os.path.exists(path)]
    if checked and missing:
        if module.check_mode:
            return [file.dest for file in checked]
        raise ComponentError(
            f"{', '.join(missing)} missing on this host; {checked[0].dest} cannot be checked without",
            "needs_missing",
            "put it there, or apply the role that installs it first (saw_runtime for /opt/saw)",
            missing=missing,
        )
    if not checked:
        return []
    with tempfile.TemporaryDirectory(prefix="saw-validate-") as root:
        staged: dict[str, str] = {}
        for file in files:
            if file.secret and not file.validate:
                continue
            folder = os.path.join(root, os.path.dirname(file.dest).lstrip("/"))
            os.makedirs(folder, exist_ok=True)
            staged[file.dest] = os.path.join(folder, os.path.basename(file.dest))
            with open(os.open(staged[file.dest], os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
                stream.write(file.content)
        for file in checked:
            command = [part.replace("%s", staged[file.dest]) for part in file.validate]
            code, out, err = module.run_command(command)
            if code != 0:
                raise ComponentError(
                    f"{file.dest}: the new content does not pass `{' '.join(file.validate)}`: {(err or out).strip()[-1500:]}",
                    "content_refused",
                    "correct the template or the variable behind the named line; no file was replaced",
                    dest=file.dest,
                )
    return []


def write(module: AnsibleModule, files: list[ManagedFile], notes: Notes) -> None:
    """Replace what differs and do what is owed, in order."""
    for file in files:
        if not file.changes:
            continue
        if file.apply:
            notes.write("apply", file.dest)
        if file.differs:
            file.write(file.content, file.meta)
        if not file.apply:
            continue
        code, out, err = module.run_command(file.apply)
        if code != 0:
            file.restore()
            if file.before is None:
                notes.strike("apply", file.dest)
            raise ComponentError(
                f"{file.dest}: `{' '.join(file.apply)}` failed: {(err or out).strip()[-1500:]}",
                "apply_failed",
                "correct the named line and run the play again; the file's old content is back in place",
                dest=file.dest,
            )
        notes.strike("apply", file.dest)


def strangers(folders: list[str], files: list[ManagedFile]) -> list[str]:
    """Files that lie in ``folders`` and are not wanted there."""
    wanted = {file.dest for file in files}
    found = [
        os.path.join(folder, name) for folder in folders if os.path.isdir(folder) for name in sorted(os.listdir(folder))
    ]
    return [path for path in found if path not in wanted and not os.path.isdir(path)]


def remove(paths: list[str], notes: Notes) -> None:
    """Take strangers away. The note stays: its date is the folder's last loss, which running units must be younger than."""
    for folder in sorted({os.path.dirname(path) for path in paths}):
        notes.write("removed", folder)
    for path in paths:
        os.unlink(path)


def ensure(module: AnsibleModule) -> dict[str, Any]:
    """Do the step and return the module's result."""
    notes, check = Notes(), module.check_mode
    files = [ManagedFile(wanted, notes) for wanted in module.params["files"]]
    changing = [file for file in files if file.changes]
    removed = strangers(module.params["exclusive"], files)
    units = Units(module, notes)
    unchecked = validate(module, files)
    if not check:
        if units.booted and changing:
            notes.write("daemon-reload")
        write(module, files, notes)
        remove(removed, notes)
    owed = notes.owed("daemon-reload")
    if owed and not check:
        units.reload_manager()
    watched = [*module.params["watch"], *(file.dest for file in files)]
    watched += [notes.place("removed", folder) for folder in module.params["exclusive"]]
    newest = max((os.stat(path).st_mtime for path in watched if os.path.exists(path)), default=0.0)
    if check and (changing or removed):
        newest = float("inf")
    unsettled = check and bool(changing)
    reports = [units.handle(unit, newest, check=check, unsettled=unsettled) for unit in module.params["units"]]
    return {
        "changed": bool(changing or removed or owed) or any(report["actions"] for report in reports),
        "changed_files": [*(file.dest for file in changing), *removed],
        "unchecked": unchecked,
        "booted": units.booted,
        "units": reports,
        "diff": [file.diff() for file in changing if file.differs],
    }


def main() -> None:
    """Entry point."""
    os.umask(0o022)  # services read what is made here, whatever the umask of the play's own session
    file_options = {
        "dest": {"type": "path", "required": True},
        "content": {"type": "str"},
        "secret_base64": {"type": "str", "no_log": True},
        "mode": {"type": "str", "default": "0644"},
        "owner": {"type": "str", "default": "root"},
        "group": {"type": "str", "default": "root"},
        "validate": {"type": "list", "elements": "str", "default": []},
        "lines": {"type": "list", "elements": "str", "default": []},
        "apply": {"type": "list", "elements": "str", "default": []},
    }
    unit_options = {
        "name": {"type": "str", "required": True},
        "enabled": {"type": "bool"},
        "state": {"type": "str", "default": "started", "choices": ["started", "reloaded", "present", "stopped"]},
    }
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": file_options,
                "mutually_exclusive": [("content", "secret_base64")],
                "required_one_of": [("content", "secret_base64")],
            },
            "exclusive": {"type": "list", "elements": "path", "default": []},
            "units": {"type": "list", "elements": "dict", "default": [], "options": unit_options},
            "needs": {"type": "list", "elements": "path", "default": []},
            "watch": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**ensure(module))
    except ComponentError as error:
        module.fail_json(msg=str(error), failure=error.failure)


if __name__ == "__main__":
    main()
