"""Looks for secrets in everything that a VM consists of, in each form in which they could lie there.

The search runs on the hypervisor over the VM's memory, qemu's and swtpm's own memory, both disks, the TPM's state and what
else lies in the VM's directories. Zero bytes are removed before the comparison, which makes UTF-16 text plain.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, field

from vm_access import Workspace

SEARCH = r"""
import json, os, pathlib, re, socket, subprocess, sys

spec = __import__("saw.vm.spec", fromlist=["load_spec"]).load_spec(sys.argv[1])
patterns = pathlib.Path("/run/secret-search.patterns")
memory, root = spec.directory / "memory.dump", spec.directory / "root.dump"


def qmp(*commands):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(spec.runtime / "qmp.sock"))
        stream = connection.makefile("rwb")
        stream.readline()
        for command in ({"execute": "qmp_capabilities"}, *commands):
            stream.write(json.dumps(command).encode() + b"\n")
            stream.flush()
            answer = {}
            while not {"return", "error"} & answer.keys():
                answer = json.loads(stream.readline())
            if "error" in answer:
                sys.exit(f"qemu: {command['execute']}: {answer['error']}")


def pieces_of(path):
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 22):
            yield piece


def pieces_of_process(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as stream:
        for line in maps:
            begin, end = (int(number, 16) for number in line.split()[0].split("-"))
            if line.split()[1][0] != "r" or line.rstrip().endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            while begin < end:
                try:
                    stream.seek(begin)
                    piece = stream.read(min(1 << 22, end - begin))
                except OSError:
                    break
                if not piece:
                    break
                begin += len(piece)
                yield piece


def found_in(pieces):
    program = f"tr -d '\\000' | LC_ALL=C grep -a -o -F -f {patterns} | LC_ALL=C sort -u"
    child = subprocess.Popen(["sh", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    size = 0
    with child.stdin:
        for piece in pieces:
            size += len(piece)
            child.stdin.write(piece)
    text = child.stdout.read().decode("ascii")
    child.wait()
    return {"bytes": size, "found": text.split()}


def processes():
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            words = (entry / "cmdline").read_bytes().split(b"\0") if (entry / "cmdline").exists() else [b""]
            if re.search(rb"/(qemu-system-x86_64|swtpm)$|^qemu-system", words[0]) and spec.id.encode() in b" ".join(words):
                yield pathlib.Path(os.fsdecode(words[0])).name, entry.name


patterns.write_bytes(sys.stdin.buffer.read())
answer = {}
try:
    memory.touch(mode=0o600)
    stop, go_on = {"execute": "stop"}, {"execute": "cont"}
    save = {"val": 0, "size": spec.memory_mib << 20, "filename": str(memory)}
    try:
        qmp(stop, {"execute": "pmemsave", "arguments": save})
    finally:
        qmp(go_on)
    answer["memory"] = found_in(pieces_of(memory))
    memory.unlink()
    for name, pid in processes():
        answer[f"process {name}"] = found_in(pieces_of_process(pid))
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", spec.directory / "root.qcow2", root], check=True)
    answer["root disk"] = found_in(pieces_of(root))
    root.unlink()
    answer["data disk"] = found_in(pieces_of(spec.directory / "data.img"))
    answer["tpm"] = found_in(piece for path in (spec.directory / "tpm").iterdir() for piece in pieces_of(path))
    searched = {"root.qcow2", "data.img", memory.name, root.name}
    rest = [path for folder in (spec.directory, spec.runtime) for path in folder.iterdir()]
    rest = [path for path in rest if path.is_file() and path.name not in searched]
    answer["other files"] = found_in(piece for path in rest for piece in pieces_of(path))
finally:
    for path in (patterns, memory, root):
        path.unlink(missing_ok=True)
print(json.dumps(answer))
"""


def forms_of(secret: str) -> dict[str, str]:
    """The texts in which ``secret`` could lie somewhere; a match of one of them is the secret.

    Base64 changes with the place at which the secret begins, so there is one form for each of the three, cut to the
    characters that do not depend on what stands before and behind.
    """
    raw = secret.encode()
    found = {
        "raw": secret,
        "percent": "".join(f"%{byte:02X}" for byte in raw),
        "percent, lower case": "".join(f"%{byte:02x}" for byte in raw),
        "hex": raw.hex(),
        "Basic": base64.b64encode(b"x-access-token:" + raw).decode().rstrip("="),
    }
    for lead in range(3):
        for name, encode in (("base64", base64.b64encode), ("base64url", base64.urlsafe_b64encode)):
            text = encode(bytes(lead) + raw).decode()
            found[f"{name} at {lead}"] = text[-(-lead * 8 // 6) : (lead + len(raw)) * 8 // 6]
    return found


@dataclass(frozen=True)
class Markers:
    """Texts that a VM derives itself from ``seed``, so that no script that we hand in contains one."""

    seed: str = field(default_factory=lambda: secrets.token_hex(16))

    def text(self, place: str) -> str:
        """The marker of ``place``."""
        import hashlib

        return "saw" + hashlib.sha256(f"{self.seed}/{place}".encode()).hexdigest()[:32]


def search(workspace: Workspace, wanted: dict[str, str]) -> dict[str, set[tuple[str, str]]]:
    """Search the running VM for ``wanted`` (name → secret); return per place which ``(name, form)`` were found there."""
    names: dict[str, set[tuple[str, str]]] = {}
    for name, secret in wanted.items():
        for form, text in forms_of(secret).items():
            names.setdefault(text, set()).add((name, form))
    program = f"/opt/saw/bin/python -c \"$(cat <<'END_OF_PROGRAM'\n{SEARCH}\nEND_OF_PROGRAM\n)\" {workspace.id}"
    answer = json.loads(workspace.host("edge", program, stdin="\n".join(names), timeout=600))
    assert all(place["bytes"] > 1000 for place in answer.values()), answer
    return {place: {pair for text in found["found"] for pair in names[text]} for place, found in answer.items()}
