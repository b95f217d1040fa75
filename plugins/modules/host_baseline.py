#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What hardening a host takes besides files of its own: values in force, modes, accounts, lines in files of packages."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_baseline
short_description: Bring kernel values, mounts, shared files, permissions and accounts of a host to a baseline
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Compares what is in force on a host with what is wanted, in one step, and corrects what differs. What cannot be had there, as
    a kernel parameter in a container, is left alone and listed in RV(unavailable); it is no error.
  - Only ever tightens modes and only ever locks accounts; it opens nothing.
  - Needs nothing but Python's standard library on the host.
attributes:
  check_mode:
    support: full
    description: Lists what would change.
  diff_mode:
    support: full
    description: Shows each value before and after; never a password hash.
  idempotent:
    support: full
    description: A second run changes nothing.
options:
  sysctl:
    description: Kernel parameters by name, with the value that has to be in force. Nothing happens where systemd does not run.
    type: dict
    default: {}
  mounts:
    description:
      - Mount points with the options that have to be in force. A folder that is no mount point becomes one, mounted on itself.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Mount point.
        type: path
        required: true
      options:
        description: Options that must be in force.
        type: list
        elements: str
        required: true
  settings:
    description: Single values in files that a package owns and that have no folder for additions.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The file. One that is missing is skipped.
        type: path
        required: true
      key:
        description: Name of the setting.
        type: str
        required: true
      value:
        description: Its value.
        type: str
        required: true
      separator:
        description: What stands between both.
        type: str
        default: " "
  words_removed:
    description: Words that may stand in no line of a file that is not a comment.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The file. One that is missing is skipped.
        type: path
        required: true
      word:
        description: The word.
        type: str
        required: true
  ensured:
    description: Commands that bring a file into order when it lacks something.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: The file. One that is missing is skipped.
        type: path
        required: true
      matches:
        description: Regular expressions; each has to match a line.
        type: list
        elements: str
        required: true
      command:
        description: Command that puts them there.
        type: list
        elements: str
        required: true
  permissions:
    description: The widest mode that files and folders may have. Bits beyond it are taken away, none is added.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Path, or a pattern of paths. What does not exist, and symbolic links, are passed over.
        type: path
        required: true
      mode:
        description: Widest permission bits, in octal.
        type: str
        required: true
      owner:
        description: Account that must own it; absent leaves that alone.
        type: str
  accounts:
    description: Rules for accounts; absent leaves all accounts alone.
    type: dict
    suboptions:
      max_days:
        description:
          - Longest life of a password in days, for accounts that have one.
          - An account whose password would run out at once is skipped.
        type: int
        required: true
      min_days:
        description: Shortest life of a password in days.
        type: int
        required: true
      warn_days:
        description: Days of warning before a password runs out.
        type: int
        required: true
      keep_shell:
        description: System accounts that keep their shell. One with authorized keys keeps it too.
        type: list
        elements: str
        default: [root]
"""

EXAMPLES = r"""
- name: Values in force
  secure_agent.workspace.host_baseline:
    sysctl:
      kernel.kptr_restrict: "2"
    permissions:
      - {path: /etc/shadow, mode: "0640", owner: root}
"""

RETURN = r"""
changes:
  description: What was, or would be, changed.
  returned: success
  type: list
  elements: dict
  sample: [{kind: sysctl, target: kernel.kptr_restrict, before: "0", after: "2"}]
unavailable:
  description: What could not be had on this host, with the reason.
  returned: success
  type: list
  elements: dict
  sample: [{kind: sysctl, target: kernel.sysrq, reason: read-only here}]
failure:
  description: What failed, for programs.
  returned: failure
  type: dict
  sample: {code: command_failed, details: {command: [mount]}, cure: read the message}
"""

import glob
import os
import pwd
import re
import stat
import tempfile
import time
from functools import partial
from typing import Any, Callable

from ansible.module_utils.basic import AnsibleModule

BOOTED = "/run/systemd/system"
CONTAINER = "/run/systemd/container"
PROC_SYS = "/proc/sys"
MOUNTINFO = "/proc/self/mountinfo"
ACCOUNTS = "/etc/passwd"
SHADOW = "/etc/shadow"
LOGIN_DEFS = "/etc/login.defs"
NOLOGIN = "/usr/sbin/nologin"
#: Accounts of the system whose shell is no shell.
CLOSED = {"nologin", "false", "sync", "shutdown", "halt"}


class Failed(Exception):
    """Something that stops the step."""


class Host:
    """Collects what differs, so that check mode and the real run decide alike."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.booted = os.path.isdir(BOOTED)
        self.container = os.path.exists(CONTAINER)
        self.changes: list[dict[str, str]] = []
        self.unavailable: list[dict[str, str]] = []

    def change(
        self, kind: str, target: str, before: str, after: str, do: Callable[[], object], *, may_fail: bool = False
    ) -> None:
        """Note a difference, and mend it unless this is check mode. What the kernel may refuse is skipped, with its words."""
        if not self.module.check_mode:
            try:
                do()
            except (OSError, Failed) as error:
                if not may_fail:
                    raise
                self.skip(kind, target, f"{error}; it stays {before}")
                return
        self.changes.append({"kind": kind, "target": target, "before": before, "after": after})

    def skip(self, kind: str, target: str, reason: str) -> None:
        """Note what cannot be had here."""
        self.unavailable.append({"kind": kind, "target": target, "reason": reason})

    def run(self, *command: str) -> None:
        """Run a command; raise :class:`Failed` with its words."""
        code, out, err = self.module.run_command(list(command))
        if code != 0:
            raise Failed(f"`{' '.join(command)}` failed: {(err or out).strip()[-800:]}")


def text_of(path: str) -> str | None:
    """Content of a file, or None when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read()
    except OSError:
        return None


def replace(path: str, text: str) -> None:
    """Replace a file atomically; mode and owner stay."""
    status = os.stat(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path))
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)
            os.fchown(stream.fileno(), status.st_uid, status.st_gid)
            os.fchmod(stream.fileno(), stat.S_IMODE(status.st_mode))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sysctl(host: Host, wanted: dict[str, Any]) -> None:
    """Kernel parameters in force."""
    if not host.booted:
        return
    for name, value in sorted(wanted.items()):
        path = os.path.join(PROC_SYS, name.replace(".", "/"))
        now = text_of(path)
        if now is None:
            host.skip("sysctl", name, "this kernel has no such parameter")
            continue
        before, after = " ".join(now.split()), str(value)
        if before == after:
            continue
        if not os.access(path, os.W_OK):
            host.skip("sysctl", name, f"read-only here, it is {before}")
            continue

        def write(path: str = path, after: str = after) -> None:
            with open(path, "w", encoding="ascii") as stream:
                stream.write(after)

        host.change("sysctl", name, before, after, write, may_fail=True)


def mounted() -> dict[str, set[str]]:
    """Options in force for each mount point; the uppermost mount counts. See proc_pid_mountinfo(5)."""
    found: dict[str, set[str]] = {}
    for line in (text_of(MOUNTINFO) or "").splitlines():
        fields, rest = line.split(" - ", 1)
        point, options = fields.split()[4:6]
        found[point.encode().decode("unicode_escape")] = set(options.split(",")) | set(rest.split()[2].split(","))
    return found


def mounts(host: Host, wanted: list[dict[str, Any]]) -> None:
    """Options of mount points in force."""
    if not host.booted:
        return
    table = mounted()
    for entry in wanted:
        path, options = entry["path"], entry["options"]
        if not os.path.isdir(path) or os.path.islink(path):
            host.skip("mount", path, "it is no folder here")
            continue
        now = table.get(path)
        missing = [option for option in options if option not in (now or ())]
        if not missing:
            continue

        def remount(path: str = path, options: tuple[str, ...] = tuple(options), new: bool = now is None) -> None:
            if new:
                host.run("mount", "--bind", path, path)
            own = [option for option in options if option not in {"nosuid", "nodev", "noexec"}]
            host.run("mount", "-o", ",".join(["remount", *([] if own else ["bind"]), *options]), path)

        before = "no mount" if now is None else f"without {','.join(missing)}"
        host.change("mount", path, before, ",".join(options), remount, may_fail=host.container)


def settings(host: Host, wanted: list[dict[str, Any]]) -> None:
    """Single values in files of packages."""
    for entry in wanted:
        path, key, separator = entry["path"], entry["key"], entry["separator"]
        text = text_of(path)
        if text is None:
            host.skip("setting", f"{path}:{key}", "there is no such file")
            continue
        between = rf"\s*{re.escape(separator.strip())}\s*" if separator.strip() else r"\s+"
        active = re.compile(rf"\s*{re.escape(key)}{between}(.*)")
        lines = text.splitlines()
        places = [number for number, line in enumerate(lines) if active.fullmatch(line)]
        found = [lines[number].strip().removeprefix(key).strip(f" \t{separator}") for number in places]
        if found == [entry["value"]]:
            continue
        line = f"{key}{separator}{entry['value']}"
        kept = (
            [line if number == places[0] else old for number, old in enumerate(lines) if number not in places[1:]]
            if places
            else [*lines, line]
        )
        after = "\n".join(kept) + "\n"
        host.change(
            "setting", f"{path}:{key}", " and ".join(found) or "unset", entry["value"], partial(replace, path, after)
        )


def words_removed(host: Host, wanted: list[dict[str, Any]]) -> None:
    """Words that must not stand in a file."""
    for entry in wanted:
        path, word = entry["path"], entry["word"]
        text = text_of(path)
        if text is None:
            host.skip("word", f"{path}:{word}", "there is no such file")
            continue
        pattern = re.compile(rf"(?<=\S)[ \t]+{re.escape(word)}(?=\s|$)")
        lines = [
            line if line.lstrip().startswith("#") else pattern.sub("", line) for line in text.splitlines(keepends=True)
        ]
        if "".join(lines) != text:
            host.change("word", path, word, "removed", partial(replace, path, "".join(lines)))


def ensured(host: Host, wanted: list[dict[str, Any]]) -> None:
    """Lines that a command puts into a file."""
    for entry in wanted:
        path = entry["path"]
        text = text_of(path)
        if text is None:
            host.skip("lines", path, "there is no such file")
            continue
        missing = [one for one in entry["matches"] if not re.search(one, text, re.MULTILINE)]
        if not missing:
            continue

        def repair(entry: dict[str, Any] = entry) -> None:
            host.run(*entry["command"])
            text = text_of(entry["path"]) or ""
            still = [one for one in entry["matches"] if not re.search(one, text, re.MULTILINE)]
            if still:
                raise Failed(f"{entry['path']} still lacks {still[0]!r} after `{' '.join(entry['command'])}`")

        host.change("lines", path, f"no line with {', '.join(missing)}", "present", repair)


def permissions(host: Host, wanted: list[dict[str, Any]]) -> None:
    """Widest modes and owners."""
    for entry in wanted:
        widest = int(entry["mode"], 8)
        for path in sorted(glob.glob(entry["path"])):
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                continue
            now = stat.S_IMODE(status.st_mode)
            if now & ~widest:
                host.change("mode", path, f"{now:04o}", f"{now & widest:04o}", partial(os.chmod, path, now & widest))
            owner = entry["owner"]
            if owner and status.st_uid != pwd.getpwnam(owner).pw_uid:
                uid = pwd.getpwnam(owner).pw_uid
                host.change("owner", path, str(status.st_uid), owner, partial(os.chown, path, uid, -1))


def accounts(host: Host, rules: dict[str, Any] | None) -> None:
    """Empty passwords, shells of system accounts, ages of passwords."""
    if rules is None:
        return
    found = re.search(r"^\s*UID_MIN\s+(\d+)", text_of(LOGIN_DEFS) or "", re.MULTILINE)
    first_person = int(found[1]) if found else 1000
    entries = [line.split(":") for line in (text_of(ACCOUNTS) or "").splitlines() if line.count(":") == 6]
    shadow = {
        line.split(":")[0]: line.split(":") for line in (text_of(SHADOW) or "").splitlines() if line.count(":") == 8
    }
    for entry in entries:
        name, uid, home, shell = entry[0], entry[2], entry[5], entry[6]
        secret = shadow.get(name)
        if secret is not None and secret[1] == "":
            host.change("password", name, "empty", "locked", partial(host.run, "usermod", "--lock", name))
        if int(uid) < first_person and os.path.basename(shell) not in CLOSED and name not in rules["keep_shell"]:
            if os.path.exists(os.path.join(home, ".ssh/authorized_keys")):
                host.skip("shell", name, f"keys open this system account, it keeps {shell}")
            else:
                host.change(
                    "shell",
                    name,
                    shell or "/bin/sh",
                    NOLOGIN,
                    partial(host.run, "usermod", "--shell", NOLOGIN, name),
                )
        if secret is not None and re.match(r"[$_./0-9A-Za-z]", secret[1]):
            ages(host, secret, rules)


def ages(host: Host, secret: list[str], rules: dict[str, Any]) -> None:
    """Ages of one account's password; see shadow(5)."""
    name, changed = secret[0], int(secret[2] or 0)
    now = [int(field) if field else -1 for field in secret[3:6]]
    wanted = [rules["min_days"], rules["max_days"], rules["warn_days"]]
    if 0 <= now[1] <= wanted[1]:
        wanted[1] = now[1]  # an earlier end that somebody set stays
    if now == wanted:
        return
    if changed + wanted[1] <= time.time() // 86400:
        host.skip(
            "age",
            name,
            f"its password is older than {wanted[1]} days and would run out at once: have it changed first",
        )
        return
    low, high, warn = (str(number) for number in wanted)
    host.change(
        "age", name, "/".join(str(number) for number in now), f"{low}/{high}/{warn}",
        partial(host.run, "chage", "--mindays", low, "--maxdays", high, "--warndays", warn, name),
    )  # fmt: skip


def main() -> None:
    """Entry point."""

    def entries(**options: Any) -> dict[str, Any]:
        return {"type": "list", "elements": "dict", "default": [], "options": options}

    path = {"type": "path", "required": True}
    text = {"type": "str", "required": True}
    texts = {"type": "list", "elements": "str", "required": True}
    days = {"type": "int", "required": True}
    module = AnsibleModule(
        argument_spec={
            "sysctl": {"type": "dict", "default": {}},
            "mounts": entries(path=path, options=texts),
            "settings": entries(
                path=path, key={**text, "no_log": False}, value=text, separator={"type": "str", "default": " "}
            ),
            "words_removed": entries(path=path, word=text),
            "ensured": entries(path=path, matches=texts, command=texts),
            "permissions": entries(path=path, mode=text, owner={"type": "str"}),
            "accounts": {
                "type": "dict",
                "options": {
                    "max_days": days,
                    "min_days": days,
                    "warn_days": days,
                    "keep_shell": {"type": "list", "elements": "str", "default": ["root"]},
                },
            },
        },
        supports_check_mode=True,
    )
    host = Host(module)
    steps = (sysctl, mounts, ensured, words_removed, settings, permissions, accounts)
    try:
        for step in steps:
            step(host, module.params[step.__name__])
    except Failed as error:
        cure = "correct what the message names, then run the play again"
        failure = {"code": "command_failed", "details": {"done": host.changes}, "cure": cure}
        module.fail_json(msg=str(error), failure=failure)

    def side(which: str) -> str:
        return "".join(f"{one['kind']} {one['target']}: {one[which]}\n" for one in host.changes)

    diff = {"before_header": "in force", "after_header": "wanted", "before": side("before"), "after": side("after")}
    module.exit_json(changed=bool(host.changes), changes=host.changes, unavailable=host.unavailable, diff=diff)


if __name__ == "__main__":
    main()
