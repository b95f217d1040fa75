"""Cases of the suites ``process`` and ``files``."""

from __future__ import annotations

from typing import Any

from saw.conformance.case import Case

FILTER = "system call filter"
SCOPE = "empty file system, Landlock"
ABSENT = ("EACCES", "EPERM", "ENOENT", "EROFS", "ENOTDIR")
"""What is not listed does not exist, or may not be opened."""


def _process(
    name: str, title: str, attempt: str, arguments: dict[str, Any] | None = None, *, control: str = "RUN-03",
    layer: str = FILTER, expected: tuple[str, ...] = ("EPERM",), twin: str = "twin.process.fork", **more: Any,
) -> Case:  # fmt: skip
    return Case(f"process.{name}", control, "process", title, attempt, arguments or {}, layer, expected, twin, **more)


def _call(name: str, title: str, number: int, *arguments: Any, reached: tuple[str, ...] = (), **more: Any) -> Case:
    given = {"number": number, "arguments": list(arguments), "reached": list(reached)}
    return _process(name, title, "call", given, **more)


USER, MOUNT, NET, PID, IPC, UTS = 0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x08000000, 0x04000000


def _calls() -> list[Case]:
    return [
        _process("ptrace", "attach to another process", "ptrace"),
        _process("traceme", "be traced by a parent", "traceme"),
        _process("vm-read", "read another process's memory", "vm-access", {"number": 310}),
        _process("vm-write", "write another process's memory", "vm-access", {"number": 311}),
        _process("pidfd-getfd", "take a descriptor out of another process", "pidfd-getfd"),
        _process("kcmp", "compare kernel objects of two processes", "kcmp"),
        _process("io-uring", "io_uring", "io-uring"),
        _call("keyctl", "the session's key ring", 250, 0, -3, 1),
        _call("add-key", "a key in the process's key ring", 248, "user", "saw-probe", "x", 1, -2),
        _process("bpf-map", "a BPF map", "bpf", {"command": 0}),
        _process("bpf-program", "a BPF program", "bpf", {"command": 5}),
        _call("userfaultfd", "userfaultfd", 323, 1),
        _process("perf", "performance events", "perf"),
        _process("mount", "mount a file system", "mount"),
        _call("fsopen", "the new mount API: fsopen", 430, "tmpfs", 0),
        _call("open-tree", "the new mount API: a detached copy of a tree", 428, -100, "/tmp", 1),  # noqa: S108
        _call("pivot-root", "another root directory: pivot_root", 155, "/tmp", "/tmp", reached=("EINVAL", "EBUSY")),  # noqa: S108
        _call("chroot", "another root directory: chroot", 161, "/tmp"),  # noqa: S108
        _call("unshare-user", "a user namespace", 272, USER),
        _call("unshare-user-mount", "a user namespace with mounts of its own", 272, USER | MOUNT),
        _call("unshare-user-net", "a user namespace with a packet filter of its own", 272, USER | NET),
        _call("unshare-mount", "a mount namespace", 272, MOUNT),
        _call("unshare-pid", "a PID namespace", 272, PID),
        _process("clone-user", "a user namespace by clone", "clone", {"flags": USER}),
        _process("clone3-user", "a user namespace by clone3", "clone3", {"flags": USER}, expected=("ENOSYS", "EPERM")),
        _process("setns", "enter a namespace by its file", "setns", {"path": "/proc/self/ns/net"}),
        _process("setns-host", "enter the namespace of process 1", "setns", {"path": "/proc/1/ns/mnt"},
                 expected=("EPERM", "EACCES")),
        _process("file-handle", "open a file by its handle", "file-handle"),
        _call("personality", "switch address randomisation off", 135, 0x0040000),
        _call("modify-ldt", "change the local descriptor table", 154, 0, None, 0),
        _call("memfd-secret", "memory that the kernel itself cannot read", 447, 0, expected=("EPERM", "ENOSYS")),
        _call("fanotify", "watch the whole file system", 300, 0x200, 0),
        _call("move-pages", "move another process's memory", 279, 0, 0, None, None, None, 0),
        _call("module", "load a kernel module", 313, -1, "", 0, reached=("EBADF",)),
        _call("kexec", "boot another kernel", 246, 0, 100000, None, 0, reached=("EINVAL",)),
        _call("iopl", "ports of the hardware", 172, 3),
        _call("kernel-log", "read the kernel's log", 103, 3, None, 0, reached=("EINVAL",)),
        _call("swap", "switch swap on", 167, "/nonexistent/saw-probe", 0, reached=("ENOENT",)),
        _call("quota", "ask for quotas of others", 179, 0x80000700, "/dev/null", 0, None, reached=("ENOTBLK",)),
        _process("hostname", "set the host's name", "hostname"),
        _process("i386", "enter the kernel as i386", "machine-code", {"code": "b814000000cd80c3"},
                 expected=("signal:SIGSYS",), twin="twin.process.native"),
        _process("x32", "enter the kernel as x32", "machine-code", {"code": "b8270000400f05c3"},
                 expected=("signal:SIGSYS",), twin="twin.process.native"),
        _process("fileless", "execute a program without a file, by /proc", "fileless", {"how": "proc"},
                 expected=("ENOSYS", "EACCES", "EPERM"), twin="twin.process.sealed-memory"),
        _process("fileless-execveat", "execute a program without a file, by execveat", "fileless", {"how": "execveat"},
                 expected=("ENOSYS", "EACCES", "EPERM"), twin="twin.process.sealed-memory"),
        _process("tiocsti", "type into a terminal", "terminal", {"request": 0x5412}, twin="twin.process.terminal"),
        _call("unknown", "a system call that does not exist yet", 480, 0, expected=("ENOSYS", "EPERM")),
    ]  # fmt: skip


def _rights() -> list[Case]:
    unit = "unit: no capabilities, no new privileges"
    beside = "unit: own PID namespace; Landlock: signals"
    hidden = ("hidden", "ENOENT", "ESRCH", "EPERM", "EACCES")

    def host(name: str, title: str, what: str, **more: Any) -> Case:
        arguments = {"pid": "${host_pid}", "mark": "${nonce}" if what == "signal" else "${host_mark}", "what": what}
        return _process(f"host.{name}", title, "host-process", arguments, layer=beside, expected=hidden,
                        twin="twin.process.own", **more)  # fmt: skip

    return [
        _process("setuid", "become root", "identity", {"how": "setuid"}, layer=unit),
        _process("setgid", "join root's group", "identity", {"how": "setgid"}, layer=unit),
        _process("setgroups", "take supplementary groups", "identity", {"how": "setgroups"}, layer=unit),
        _process("root", "hold a capability, or be root", "root", layer=unit, expected=("none_held",)),
        _process("setuid-program", "run a set-user-id program as root", "setuid-program", layer=unit,
                 expected=("no_new_privileges", "nosuid", "not_started")),
        _process("realtime", "real-time scheduling", "priority", {"what": "realtime"}, layer=unit),
        _process("nice", "a higher priority", "priority", {"what": "nice"}, layer=unit, expected=("EPERM", "EACCES")),
        _process("oom", "be spared when memory runs out", "priority", {"what": "oom"}, layer=unit,
                 expected=("EACCES", "EPERM", "EROFS", "ENOENT")),
        _process("host.see", "see processes of the host", "find-process", {"mark": "${host_mark}"}, layer=beside,
                 expected=("hidden",), twin="twin.process.own"),
        host("environment", "read the environment of a process of the host", "environment", control="CRED-01"),
        host("memory", "read the memory of a process of the host", "memory", control="CRED-01"),
        host("trace", "trace a process of the host", "trace"),
        host("signal", "signal a process of the host", "signal", recorded=True, arrival=True),
        _process("host.shared-memory", "read System V shared memory of the host", "shared-memory",
                 {"key": "${shm_key}", "mark": "${host_mark}"}, layer="unit: own IPC namespace",
                 expected=("ENOENT", "absent", "EACCES"), twin="twin.process.own"),
        _process("limit.tasks", "two thousand tasks at once", "limit", {"what": "tasks", "bound": 2000},
                 layer="unit: cgroup", expected=("EAGAIN",), seconds=30.0, needs=("cgroup",)),
        _process("limit.descriptors", "twenty thousand open descriptors", "limit", {"what": "descriptors", "bound": 20000},
                 layer="launcher: limits", expected=("EMFILE",), seconds=20.0),
        _process("limit.memory", "more memory than the policy gives", "limit", {"what": "memory", "bound": "${beyond_memory}"},
                 layer="unit: cgroup", expected=("signal:SIGKILL", "ENOMEM"), seconds=90.0, needs=("cgroup",)),
        _process("limit.core", "core dumps", "limit", {"what": "core", "bound": 1048576}, layer="launcher: limits"),
    ]  # fmt: skip


def _files() -> list[Case]:
    def case(
        name: str, title: str, attempt: str, arguments: dict[str, Any], *, control: str = "RUN-02",
        expected: tuple[str, ...] = ABSENT, twin: str = "twin.files.tmp", **more: Any,
    ) -> Case:  # fmt: skip
        layer = more.pop("layer", SCOPE)
        return Case(f"files.{name}", control, "files", title, attempt, arguments, layer, expected, twin, **more)

    def reading(name: str, title: str, path: str, **more: Any) -> Case:
        return case(f"read.{name}", title, "read", {"path": path}, twin="twin.files.read", **more)

    def making(name: str, title: str, path: str, **more: Any) -> Case:
        return case(f"write.{name}", title, "create", {"path": path}, **more)

    def opening(name: str, title: str, path: str, **more: Any) -> Case:
        return case(f"write.{name}", title, "open-write", {"path": path}, **more)

    def canary(name: str, title: str, fact: str) -> Case:
        arguments = {"path": f"${{{fact}}}", "mark": "${host_mark}"}
        return case(name, title, "read", arguments, expected=(*ABSENT, "absent"), twin="twin.files.tmp")

    return [
        reading("shadow", "password hashes", "/etc/shadow"),
        reading("root-home", "root's home directory", "/root"),
        reading("ssh-host-key", "the host's SSH key", "/etc/ssh/ssh_host_ed25519_key"),
        reading("sudoers", "who may become root", "/etc/sudoers"),
        reading("kcore", "the kernel's memory", "/proc/kcore"),
        reading("dev-mem", "the machine's memory", "/dev/mem"),
        reading("kmsg", "the kernel's messages", "/dev/kmsg", expected=(*ABSENT, "EAGAIN")),
        reading("disk", "a disk", "/dev/vda"),
        reading("boot", "kernel and boot loader", "/boot"),
        case("read.proc-1-environ", "the environment of process 1", "first-process", {"name": "environ"}, control="CRED-01",
             expected=(*ABSENT, "own_namespace"), twin="twin.files.read"),
        reading("proc-1-root", "the file system of process 1", "/proc/1/root/etc/shadow"),
        reading("self-root", "a secret through the own root link", "/proc/self/root/etc/shadow"),
        reading("dots", "a secret through dots", "/usr/../etc/shadow"),
        reading("tpm", "the TPM", "/dev/tpmrm0", control="RUN-02"),
        reading("gpu", "a GPU that was not granted", "/dev/nvidia0"),
        reading("kvm", "the hypervisor's device", "/dev/kvm"),
        reading("fuse", "file systems in user space", "/dev/fuse"),
        reading("tun", "a tunnel of one's own", "/dev/net/tun"),
        reading("efivars", "the firmware's variables", "/sys/firmware/efi/efivars"),
        reading("debug", "the kernel's debugging files", "/sys/kernel/debug"),
        canary("host.tmp", "a file of the host in /tmp", "canary_tmp"),
        canary("host.shm", "a file of the host in /dev/shm", "canary_shm"),
        canary("host.var-tmp", "a file of the host in /var/tmp", "canary_var"),
        case("descriptors", "a descriptor that was left open", "descriptors", {"mark": "${fd_mark}"}, control="RUN-03",
             expected=("closed",)),
        making("usr", "programs", "/usr/bin"),
        making("lib", "libraries", "/usr/lib"),
        making("usr-local", "programs that come first in the path", "/usr/local/bin"),
        making("etc", "configuration", "/etc"),
        making("boot", "kernel and boot loader", "/boot"),
        making("ca", "trusted authorities", "/etc/ssl/certs"),
        making("python", "modules that every Python program loads", "/usr/lib/python3/dist-packages"),
        opening("passwd", "accounts", "/etc/passwd"),
        opening("hosts", "names of hosts", "/etc/hosts"),
        opening("ld-preload", "a library in every program", "/etc/ld.so.cache"),
        opening("core-pattern", "the program that takes core dumps", "/proc/sys/kernel/core_pattern"),
        opening("sysrq", "the kernel's emergency keys", "/proc/sysrq-trigger"),
        opening("modprobe", "the program that loads modules", "/proc/sys/kernel/modprobe"),
        opening("forward", "forwarding of packets", "/proc/sys/net/ipv4/ip_forward"),
        opening("disk", "a disk", "/dev/vda"),
        case("replace.shell", "replace a program", "replace", {"path": "/usr/bin/env"}),
        case("replace.ca", "replace the trusted authorities", "replace", {"path": "/etc/ssl/certs/ca-certificates.crt"}),
        case("link.symbolic", "a secret through a symbolic link", "through-link",
             {"path": "/etc/shadow", "kind": "symbolic"}, twin="twin.files.symbolic"),
        case("link.hard", "a secret through a hard link", "through-link", {"path": "/etc/shadow", "kind": "hard"},
             expected=(*ABSENT, "EXDEV"), twin="twin.files.hard"),
        case("link.race", "a secret by swapping a file for a link", "link-race", {"path": "/etc/shadow"}, seconds=20.0,
             twin="twin.files.symbolic"),
        case("device.memory", "make a node of the machine's memory", "device-node", {"kind": "memory"}, control="RUN-03"),
        case("device.disk", "make a node of a disk", "device-node", {"kind": "disk"}, control="RUN-03"),
        case("give.owner", "give a file to root", "give-away", {"what": "owner"}, control="RUN-03"),
        case("give.capability", "give a program a capability", "give-away", {"what": "capability"}, control="RUN-03",
             expected=(*ABSENT, "EOPNOTSUPP")),
        *[
            case(f"limit.{name}", f"more of {place} than it may hold", "fill", {"path": place, "size": f"${{beyond_{limit}}}"},
                 control="RUN-03", layer="unit: bounded file systems", expected=("ENOSPC",), seconds=20.0, twin="twin.files.fill")
            for name, place, limit in (("tmp", "/tmp", "tmp"), ("var-tmp", "/var/tmp", "tmp"), ("shm", "/dev/shm", "shm"))  # noqa: S108
        ],
        *[
            case(f"limit.{name}-files", f"more files in {place} than it may hold", "fill-inodes",
                 {"path": place, "count": "${beyond_inodes}"}, control="RUN-03", layer="unit: bounded file systems",
                 expected=("ENOSPC",), seconds=240.0, twin="twin.files.inodes")
            for name, place in (("tmp", "/tmp"), ("shm", "/dev/shm"))  # noqa: S108
        ],
    ]  # fmt: skip


def _credentials() -> list[Case]:
    words = [
        "ghp_",
        "github_pat_",
        "glpat-",
        "sk-",
        "AKIA",
        "xoxb-",
        "xoxp-",
        "AIza",
        "-----BEGIN",
        "eyJhbGci",
        "npm_",
        "hf_",
    ]

    def case(name: str, title: str, attempt: str, arguments: dict[str, Any], **more: Any) -> Case:
        return Case(
            f"credentials.{name}", "CRED-01", "credentials", title, attempt, arguments,
            "no credential in the sandbox", (*ABSENT, "none_held"), "twin.credentials.environment", **more,
        )  # fmt: skip

    def home(name: str, title: str, path: str) -> Case:
        return case(name, title, "home-secret", {"path": path})

    return [
        case("environment", "a credential in the environment", "environment", {"words": words}),
        home("ssh-key", "a private SSH key", ".ssh/id_ed25519"),
        home("ssh-key-rsa", "a private SSH key (RSA)", ".ssh/id_rsa"),
        home("git", "git's stored passwords", ".git-credentials"),
        home("netrc", "stored passwords of curl", ".netrc"),
        home("aws", "keys of a cloud", ".aws/credentials"),
        home("gcloud", "keys of another cloud", ".config/gcloud/application_default_credentials.json"),
        home("kube", "the key of a cluster", ".kube/config"),
        home("docker", "passwords of registries", ".docker/config.json"),
        home("npm", "the token of a package registry", ".npmrc"),
        home("postgres", "passwords of databases", ".pgpass"),
        case("service-token", "a cluster's token", "read", {"path": "/var/run/secrets/kubernetes.io/serviceaccount/token"}),
        case("workspace-key", "the workspace's own key", "read", {"path": "/run/saw/svid/sds.json"}),
        case("ring1-ca", "the key of the proxy's authority", "read", {"path": "/run/saw/ring1-ca/ca.key"}),
    ]  # fmt: skip


def twins() -> list[Case]:
    """Return what must work."""

    def twin(name: str, title: str, attempt: str, arguments: dict[str, Any], suite: str, **more: Any) -> Case:
        control = {"process": "RUN-03", "files": "RUN-02", "credentials": "CRED-01"}[suite]
        return Case(f"twin.{name}", control, suite, title, attempt, arguments, is_twin=True, **more)

    return [
        twin("process.fork", "start a program", "fork-exec", {}, "process"),
        twin("process.native", "enter the kernel as x86-64", "machine-code", {"code": "b8270000000f05c3"}, "process"),
        twin("process.sealed-memory", "memory that can never be executed", "sealed-memory", {}, "process"),
        twin("process.terminal", "ask a terminal for its size", "terminal", {"request": 0x5413}, "process"),
        twin("process.own", "see and signal a process of one's own", "find-own", {}, "process"),
        twin("files.tmp", "write, rename and remove a file in /tmp", "write-own", {"path": "/tmp"}, "files"),  # noqa: S108
        twin("files.read", "read the list of accounts", "read", {"path": "/etc/passwd"}, "files"),
        twin("files.fill", "a megabyte of /tmp", "fill", {"path": "/tmp", "size": 1024**2}, "files"),  # noqa: S108
        twin("files.inodes", "a hundred files in /tmp", "fill-inodes", {"path": "/tmp", "count": 100}, "files"),  # noqa: S108
        twin("files.symbolic", "read an own file through a symbolic link", "own-link", {"kind": "symbolic"}, "files"),
        twin("files.hard", "read an own file through a hard link", "own-link", {"kind": "hard"}, "files"),
        twin("credentials.environment", "read one's own environment and start a program", "fork-exec", {}, "credentials"),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks of the three suites."""
    return [*_calls(), *_rights(), *_files(), *_credentials()]
