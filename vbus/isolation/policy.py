"""What an isolated process may no longer ask the kernel for, and the calls' numbers.

A list of what is denied, not of what is allowed: what the interpreter, the C library
and their allocators call changes with each release, and a device that stops because of
an update of libc is worse than a call not thought of. Landlock, which does work
by allowing, is what keeps files out of reach; this list closes the ways around it.

Denied calls fail with EPERM rather than kill. Libraries try things out and do without,
and a device must not die of that; who means harm gains nothing from an error. Only a
call by another machine's ABI kills: no program does that by chance, and its numbers
would mean other calls than those in this list.
"""

import errno
import platform
from collections.abc import Iterator
from typing import Final, NamedTuple

from vbus.isolation.bpf import Bits, Condition, Null, OneOf, Rule, assemble

CLONE_THREAD: Final = 0x00010000
SOCK_TYPE_MASK: Final = 0xF
SOCK_STREAM: Final = 1
SOCK_SEQPACKET: Final = 5
AF_UNIX: Final = 1
TIOCSTI: Final = 0x5412
TIOCLINUX: Final = 0x541C


class Machine(NamedTuple):
    """`column` is its place in NUMBERS, `arch` its AUDIT_ARCH (linux/audit.h)."""

    column: int
    arch: int
    has_x32: bool


MACHINES: Final = {
    "x86_64": Machine(0, 0xC000003E, has_x32=True),
    "aarch64": Machine(1, 0xC00000B7, has_x32=False),
}

NUMBERS: Final[dict[str, tuple[int | None, int | None]]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "kcmp": (312, 272),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "sendto": (44, 206),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18),
    "vhangup": (153, 58),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "prlimit64": (302, 261),
    "ioctl": (16, 29),
}
"""Number of each system call we have an opinion on: x86-64, aarch64."""

SOCKETS: Final = ("connect", "socket")
CONDITIONAL: Final = frozenset(
    ("clone", "clone3", "ioctl", "kill", "tgkill", "prlimit64", "sendto", "socketpair")
)
"""Those that are not denied, or not always."""


def rules(machine: Machine, pid: int, *, sockets: bool, listen: bool) -> Iterator[Rule]:
    """Give the rules for process `pid`.

    With `sockets` it may make new ones; with `listen` unix ones that others connect to.
    """

    def rule(name: str, *unless: Condition, only_if: Condition | None = None) -> Rule:
        number = NUMBERS[name][machine.column]
        assert number is not None
        return Rule(number, errno.EPERM, unless, only_if)

    for name, numbers in NUMBERS.items():
        if name not in (*CONDITIONAL, *SOCKETS) and numbers[machine.column] is not None:
            yield rule(name)
    # Threads, but no processes. The flags of clone3 are out of a filter's sight; with
    # ENOSYS the C library uses clone.
    yield rule("clone", Bits(0, CLONE_THREAD))
    yield rule("clone3")._replace(errno=errno.ENOSYS)
    # Signals and limits are its own affair: abort(), raise().
    yield rule("kill", OneOf(0, (pid,)))
    yield rule("tgkill", OneOf(0, (pid,)))
    yield rule("prlimit64", OneOf(0, (0, pid)))
    # No typing on somebody's terminal.
    yield rule("ioctl", only_if=OneOf(1, (TIOCSTI, TIOCLINUX)))
    if not sockets:
        # A pair of datagram sockets could be turned to any address.
        streams = OneOf(1, (SOCK_STREAM, SOCK_SEQPACKET), mask=SOCK_TYPE_MASK)
        yield rule("socketpair", streams)
        yield rule("sendto", Null(4))
        yield rule("connect")
        # Streams send to nobody that they are not connected to.
        yield rule("socket", *((OneOf(0, (AF_UNIX,)), streams) if listen else ()))


def program(
    machine: Machine, pid: int, *, sockets: bool = False, listen: bool = False
) -> bytes:
    """Give the filter of a process as BPF."""
    x32 = errno.ENOSYS if machine.has_x32 else 0
    found = rules(machine, pid, sockets=sockets, listen=listen)
    return assemble(machine.arch, found, x32_errno=x32)


def this_machine() -> Machine | None:
    """Give the machine we run on, None if its numbers are not known here."""
    return MACHINES.get(platform.machine())
