"""What makes a machine itself must not lie in an image: every workspace would have it, and be taken for another one.

A finished tree is looked through before its disk is made; what is found ends the build. Each workspace makes these things at its
first boot, out of the random numbers of that boot.
"""

from __future__ import annotations

from pathlib import Path

from saw.errors import SawError

TRACES = {
    "etc/machine-id": "machine id (machine-id(5)); DHCP ids, boot loader entries and other ids derive from it",
    "var/lib/dbus/machine-id": "machine id of D-Bus",
    "etc/hostid": "host id (gethostid(3))",
    "etc/ssh/ssh_host_*": "SSH host key",
    "etc/krb5.keytab": "Kerberos key",
    "etc/iscsi/initiatorname.iscsi": "iSCSI initiator name",
    "etc/hostname": "name of the machine that built the image",
    "var/lib/systemd/random-seed": "seed of random numbers",
    "var/lib/systemd/credential.secret": "key of sealed credentials (systemd-creds(1))",
    "var/lib/systemd/tpm2-srk-public-key.*": "public key of a machine's TPM",
    "var/lib/systemd/pcrlock.json": "policy of a machine's TPM",
    "var/lib/systemd/network/*": "state of systemd-networkd, DHCP leases among it",
    "var/lib/systemd/timesync/clock": "moment at which the image was made",
    "var/lib/dhcp/*": "DHCP lease",
    "var/lib/dhcpcd/*": "DHCP lease and DUID",
    "etc/dhcpcd.duid": "DHCP unique id (DUID)",
    "var/lib/NetworkManager/*": "DHCP lease, secret key of stable addresses",
    "var/lib/cloud/*": "state of cloud-init, the instance's id among it",
    "var/log/journal/*": "journal with a machine's and boots' ids",
    "boot/loader/random-seed": "seed of random numbers of the boot loader",
    "efi/loader/random-seed": "seed of random numbers of the boot loader",
    "root/.ssh/*": "SSH key of whoever built the image",
    "root/.*_history": "commands of whoever built the image",
    "home/*/.ssh/*": "SSH key of a user",
    "var/lib/saw/attest/*": "key or state of a workspace's attestation",
    "var/lib/saw-host/*": "machine id and SSH host key of a workspace whose root is read-only",
}
"""Where such things lie, by patterns relative to the root, and what they are."""
ALIASES = {
    "var/lib/dbus/machine-id": "/etc/machine-id",
    **{f"etc/ssh/{name}": f"/var/lib/saw-host/{name}" for name in ("ssh_host_ed25519_key", "ssh_host_ed25519_key.pub")},
}
"""Links that may be there, with where they lead: what is there is looked for by itself."""
EMPTY_BEFORE_BOOT = frozenset({"etc/machine-id"})
"""What has to be there and empty: systemd then makes it at the first boot and does not take that for a factory reset."""


class IdentityError(SawError):
    """A tree that is to become an image identifies a machine."""

    code = "image_identity"


def traces(root: Path) -> list[str]:
    """Return ``path: what it is`` for everything below ``root`` that identifies a machine."""
    found = []
    for pattern, what in TRACES.items():
        for path in sorted(root.glob(pattern)):
            name = str(path.relative_to(root))
            empty = name in EMPTY_BEFORE_BOOT and not path.is_symlink() and path.stat().st_size == 0
            alias = path.is_symlink() and ALIASES.get(name) == str(path.readlink())
            if not empty and not alias:
                found.append(f"{name}: {what}")
    if not all((root / name).is_file() for name in EMPTY_BEFORE_BOOT):
        found.append("etc/machine-id: missing; it has to be there and empty")
    return found


def refuse_traces(root: Path) -> None:
    """Raise :class:`IdentityError` when something below ``root`` identifies a machine."""
    found = traces(root)
    if found:
        raise IdentityError(
            f"the image would give every workspace the same identity: {'; '.join(found)}",
            cure="have the role image_hygiene remove it (roles/image_hygiene)",
            details={"traces": found},
        )
