"""The filter of system calls of the sandbox (seccomp): what a Python program of one process needs, and nothing else.

All others fail with EPERM, which Python raises as PermissionError: no sockets, no new processes or threads, no signals
to anyone, no change of anything that is not an open file of its own.
"""

from __future__ import annotations

import struct
from typing import NamedTuple


class _Machine(NamedTuple):
    """Numbers of a machine: its own for seccomp, and a column of the tables below."""

    audit_number: int
    column: int


_MACHINES = {"x86_64": _Machine(0xC000003E, 0), "aarch64": _Machine(0xC00000B7, 1)}

# System call → its number on x86-64 and on AArch64; -1 where there is none.
_ALLOWED: dict[str, tuple[int, int]] = {
    # Memory and time, the most frequent first.
    "mmap": (9, 222),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, -1),
    "times": (100, 153),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "alarm": (37, -1),
    "pause": (34, -1),
    "getrandom": (318, 278),
    # Open files, pipes, and waiting for them.
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "close": (3, 57),
    "lseek": (8, 62),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "stat": (4, -1),
    "lstat": (6, -1),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, -1),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, -1),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "umask": (95, 166),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "sendfile": (40, 71),
    "rename": (82, -1),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlink": (87, -1),
    "unlinkat": (263, 35),
    "dup": (32, 23),
    "dup2": (33, -1),
    "dup3": (292, 24),
    "pipe": (22, -1),
    "pipe2": (293, 59),
    "select": (23, -1),
    "pselect6": (270, 72),
    "poll": (7, -1),
    "ppoll": (271, 73),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, -1),
    "epoll_pwait": (281, 22),
    # Itself: what it is, its signal handlers, its end.
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrusage": (98, 165),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
}


class _Condition(NamedTuple):
    """A system call that is allowed for some values of an argument: its numbers, the argument, its bits, the values."""

    numbers: tuple[int, int]
    argument: int
    mask: int
    values: tuple[int, ...]


_ACCESS, _TRUNCATE = 0o3, 0o1000
_CONDITIONS = (
    # openat: a file that is opened for reading is not emptied, which old versions of Landlock overlook.
    _Condition((257, 56), 2, _ACCESS | _TRUNCATE, (0, 1, 2, _TRUNCATE | 1, _TRUNCATE | 2)),
    # fcntl: duplicates and flags, but no owner, to whom the kernel would send signals.
    _Condition((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030)),
    # ioctl: whether it is a terminal (TCGETS), its size, and the flags of a descriptor.
    _Condition((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)),
    # prlimit64: of itself alone.
    _Condition((302, 261), 0, 0xFFFFFFFF, (0,)),
)

_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _KILL_PROCESS, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # The last is errno 1, EPERM.
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16


def build_filter(machine: str) -> bytes | None:
    """Return the filter's instructions (classic BPF), 8 bytes each, or None if the machine's numbers are not known.

    Args:
        machine: As `platform.machine()` names it.
    """
    if machine not in _MACHINES:
        return None
    audit_number, column = _MACHINES[machine]
    code = [
        _encode(_LOAD, _MACHINE_AT),
        _encode(_EQUAL, audit_number, if_true=1),
        _encode(_RETURN, _KILL_PROCESS),
        _encode(_LOAD, _NUMBER_AT),
    ]
    for numbers in _ALLOWED.values():
        if numbers[column] >= 0:
            code += _allow_if_equal(numbers[column])
    for condition in _CONDITIONS:
        # The values are little-endian, so the lower half of an argument comes first.
        body = [
            _encode(_LOAD, _ARGUMENTS_AT + 8 * condition.argument),
            _encode(_AND, condition.mask),
            *(instruction for value in condition.values for instruction in _allow_if_equal(value)),
            _encode(_RETURN, _REFUSE),
        ]
        code += [_encode(_EQUAL, condition.numbers[column], if_false=len(body)), *body]
    return b"".join([*code, _encode(_RETURN, _REFUSE)])


def _allow_if_equal(value: int) -> list[bytes]:
    return [_encode(_EQUAL, value, if_false=1), _encode(_RETURN, _ALLOW)]


def _encode(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)
