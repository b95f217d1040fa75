"""What endpoint detection in a workspace told the broker."""

from __future__ import annotations

from typing import Any

from vm_access import Workspace, wait_until

#: The standard test file in two pieces, so that no scanner takes this file for it.
EICAR = "X5O!P%@AP[4\\PZX54(P^)7CC)7}", "$EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"
DOOR = "[Service]\\nExecStart=/bin/true\\n"
PLANT = f"""
folder=$(mktemp -d /run/plant.XXXXXX)
printf '%s%s' '{EICAR[0]}' '{EICAR[1]}' > $folder/e.com; echo harmless > $folder/note.com
printf '{DOOR}' > $folder/door.service; echo '# nothing' > $folder/door.rules
cat > $folder/script <<END
cd /etc/systemd/system
write $folder/door.service door.service
write $folder/note.com note.txt
cd /etc/audit/rules.d
write $folder/door.rules door.rules
cd /srv
write $folder/e.com e.com
write $folder/note.com note.com
write /bin/true plain
sif plain mode 0100755
write /bin/true door
sif door mode 0104755
cd /usr/bin
rm tac
write /bin/false tac
sif tac mode 0100755
END
"""
"""Shell lines for the hypervisor: one thing of each kind, each with a harmless twin, as a script of debugfs in ``$folder``."""


def plant(workspace: Workspace) -> None:
    """Write them into the stopped VM's root file system; its boot, and with it every measurement, stays what it was."""
    workspace.host(
        "edge",
        f"""{workspace.open_root_disk()}
{PLANT}
debugfs -w -f $folder/script "root.raw?offset=$offset"
qemu-img convert -O qcow2 root.raw root.qcow2.new
mv root.qcow2.new root.qcow2
rm -r root.raw $folder
""",
    )


class Findings:
    """What the broker's trail holds of the workspace's endpoint detection."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def all(self) -> list[dict[str, Any]]:
        """Every finding as the workspace wrote it, the oldest first."""
        told = [
            event["event"]["unmapped"]["saw"]
            for event in self.workspace.events()
            if event["event"]["class_uid"] == 2004
        ]
        return [
            {"verified": one["verified"], "severity": event["severity"], **event["unmapped"]["saw"]}
            for one in told
            if one.get("workspace") == self.workspace.id and (event := one.get("report", {}).get("event"))
        ]

    def subjects(self, kind: str) -> list[str]:
        """What the findings of a kind are about."""
        return [str(one["subject"]) for one in self.all() if one["kind"] == kind]

    def await_subject(self, kind: str, part: str, patience: float = 1800) -> str:
        """Wait for a finding of this kind whose subject holds ``part``; return the subject.

        A look rests 20 times the CPU time that it took, which under emulation makes minutes of seconds.
        """
        return str(
            wait_until(
                f"a finding {kind} about {part} at the broker",
                lambda: next((one for one in self.subjects(kind) if part in one), ""),
                patience=patience,
                interval=3,
            )
        )
