"""The process in which the sandbox runs one program: gives up everything it can, then runs it.

It is started by its path and imports nothing of this package, and of the standard library as little as it can: imports
are most of its time. A layer that was asked for and cannot be had ends it before the program begins.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
from importlib.machinery import SourceFileLoader

_LIBC = ctypes.CDLL(None, use_errno=True)

_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x40000000  # CLONE_NEWNS, NEWIPC, NEWUSER, NEWNET
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 0x1
# These have one number on all machines.
_SYS_MOUNT_SETATTR, _SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL = 9
_CAPABILITY_VERSION_3 = 0x20080522

# Rights of Landlock: to read a file, and to list a folder too; all that the own folder needs.
_READ_FILE, _READ = 1 << 2, 1 << 2 | 1 << 3
_WRITE = _READ | 1 << 1 | 1 << 5 | 1 << 8
_TRUNCATE = 1 << 14

_PROGRAM = "program.py"
# Not "__main__", so that what a file does when it is started is not done; the published scorers do the same.
_MODULE = "candidate"
_SHOWN_CHARACTERS = 300


class SandboxJob:
    """A program to run, and how.

    Attributes:
        token: Begins each line that the process writes about itself.
        folder: An empty folder, in which the process starts.
        layers: Layers to apply.
        readable: Files and folders that Python needs.
        limits: Name of the kernel's limit → number.
        folder_bytes: Size of the program's folder, with namespaces.
        system_calls: Instructions of the filter.
        program: Source of the program.
    """

    def __init__(
        self, token: str, folder: str, layers: list[str], readable: list[str], limits: dict[str, int],
        folder_bytes: int, system_calls: bytes, program: bytes,
    ) -> None:  # fmt: skip
        self.token, self.folder = token, folder
        self.layers, self.readable = layers, readable
        self.limits, self.folder_bytes = limits, folder_bytes
        self.system_calls, self.program = system_calls, program

    @classmethod
    def decode(cls, content: bytes) -> SandboxJob:
        """Return the job of a line of sizes and the parts that have them. JSON would take longer to import."""
        sizes, _, rest = content.partition(b"\n")
        parts = []
        for size in map(int, sizes.split()):
            parts.append(rest[:size])
            rest = rest[size:]
        token, folder, *lists, folder_bytes = map(os.fsdecode, parts[:6])
        layers, readable, pairs = (lines.splitlines() for lines in lists)
        limits = {name: int(number) for name, number in (pair.split() for pair in pairs)}
        return cls(token, folder, layers, readable, limits, int(folder_bytes), *parts[6:])


def call(function: str, *arguments: object) -> int:
    """Call a function of the C library.

    Raises:
        OSError: if it returns a negative number.
    """
    result = int(getattr(_LIBC, function)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def enter_namespaces(folder: str, readable: list[str], folder_bytes: int) -> str:
    """Move to namespaces of its own: no network, no shared memory, and a tree with nothing but what Python needs.

    Args:
        folder: An empty folder, for the new tree.
        readable: Files and folders that are visible in it, read-only.
        folder_bytes: Size of the only folder that can be written to, which is in memory.

    Returns:
        That folder.

    Raises:
        OSError: if the kernel refuses.
    """
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", _NEW_NAMESPACES)
    for name, content in (
        ("setgroups", b"deny"),
        ("uid_map", b"%d %d 1" % (uid, uid)),
        ("gid_map", b"%d %d 1" % (gid, gid)),
    ):
        _write(f"/proc/self/{name}", content)
    call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _mount_tmpfs(folder, b"size=1m,mode=755")
    for path in readable:
        _bind(path, folder + path)
    own = "/sandbox"
    os.mkdir(folder + own)
    read_only = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)
    call(
        "syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(folder), _AT_RECURSIVE, read_only,
        ctypes.c_size_t(len(read_only)),
    )  # fmt: skip
    _mount_tmpfs(folder + own, b"size=%d,nr_inodes=1024,mode=700" % folder_bytes)
    os.chdir(folder)
    call("pivot_root", b".", b".")
    call("umount2", b".", _MNT_DETACH)
    os.chdir(own)
    return own


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(descriptor, content)
    os.close(descriptor)


def _mount_tmpfs(folder: str, options: bytes) -> None:
    call("mount", b"none", os.fsencode(folder), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)


def _bind(path: str, place: str) -> None:
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, exist_ok=True)
    else:
        _write(place, b"")
    call("mount", os.fsencode(path), os.fsencode(place), None, _MS_BIND | _MS_REC, None)


def restrict_files(folder: str, readable: list[str]) -> None:
    """Restrict itself by Landlock to reading `readable` and to files in `folder`.

    Raises:
        OSError: if the kernel refuses.
    """
    version = call("syscall", _SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    rights = (1 << 13) - 1
    rights |= sum(1 << bit for since, bit in ((2, 13), (3, 14), (5, 15)) if version >= since)
    # Each version of the kernel's interface knows a longer structure: files, then TCP, then sockets and signals.
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = call("syscall", _SYS_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path, allowed in [*((path, _READ) for path in readable), (folder, (_WRITE | _TRUNCATE) & rights)]:
        target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed if os.path.isdir(path) else _READ_FILE, target)
        call("syscall", _SYS_LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(target)
    call("syscall", _SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def limit_resources(limits: dict[str, int]) -> None:
    """Set limits, name of the resource → its number, which the process cannot raise again."""
    for name, limit in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        # A second more, so that the signal that says why comes before the one that cannot be caught.
        resource.setrlimit(number, (most, most + 1 if name == "CPU" and hard == resource.RLIM_INFINITY else most))


def filter_system_calls(instructions: bytes) -> None:
    """Install a filter of system calls, in the kernel's instructions for packet filters.

    Raises:
        OSError: if the kernel refuses.
    """
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxQ", len(instructions) // 8, ctypes.addressof(buffer))
    call("prctl", _PR_SET_SECCOMP, 2, program, 0, 0)


def enter_sandbox(job: SandboxJob) -> str:
    """Apply the layers that a job asks for and leave its program in a folder where it may write.

    Returns:
        "" or the layer that cannot be had, and why.
    """
    folder, layer = job.folder, "namespaces"
    try:
        if layer in job.layers:
            folder = enter_namespaces(folder, job.readable, job.folder_bytes)
        layer = "limits"
        _write(_PROGRAM, job.program)
        call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        layer = "landlock"
        if layer in job.layers:
            restrict_files(folder, job.readable)
        layer = "limits"
        # Root has capabilities, and so has the first process of a user namespace.
        call("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24))
        call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        limit_resources(job.limits)
        layer = "seccomp"
        if layer in job.layers:
            filter_system_calls(job.system_calls)
    except Exception as error:
        return f"{layer}: {error}"
    return ""


def run_file(path: str) -> tuple[str, str]:
    """Run a file.

    Returns:
        How it ended, and the particulars: "passed" if it ran to its end.
    """
    try:
        module = sys.modules[_MODULE] = type(sys)(_MODULE)
        SourceFileLoader(_MODULE, path).exec_module(module)
    except MemoryError:
        return "memory", ""
    except BaseException as error:
        return _classify(error), _describe(error)
    return "passed", ""


def _classify(error: BaseException) -> str:
    if isinstance(error, AssertionError):
        return "assertion"
    if isinstance(error, SystemExit):
        return "exit"
    read_only = isinstance(error, OSError) and error.errno == 30
    threads = isinstance(error, RuntimeError) and "start new thread" in str(error)
    return "forbidden" if isinstance(error, PermissionError) or read_only or threads else "exception"


def _describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        return name
    return f"{name}: {text[:_SHOWN_CHARACTERS]}" if text else name


def _report(stream: int, token: str, *texts: str) -> None:
    os.write(stream, b"\0".join(text.encode("unicode_escape") for text in (token, *texts)) + b"\n")


def _flush(stream: object) -> None:
    # A program may have closed it, or put something else in its place.
    if hasattr(stream, "flush"):
        try:
            stream.flush()
        except (OSError, ValueError):
            return


def main() -> None:
    """Read a job from standard input, run it, and write to what was standard error how it begins and how it ends.

    These are two lines: the job's token, by which they are known, and what is missing; the token, and how it ended.
    """
    job = SandboxJob.decode(sys.stdin.buffer.read())
    report = os.dup(2)
    os.dup2(1, 2)
    # The next file that is opened takes the first free number, which is that of standard input.
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    os.environ.clear()
    # The folder of this file is the first.
    del sys.path[0]
    missing = enter_sandbox(job)
    _report(report, job.token, missing)
    if not missing:
        ending = run_file(_PROGRAM)
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        _report(report, job.token, *ending)
    os._exit(0)


if __name__ == "__main__":
    main()
