"""Landlock: from now on only these paths, no TCP, no signals to others.

Landlock works by allowing: what no rule names is denied (EACCES, or EPERM for
signals). It has nothing to say on descriptors that are open already, so a process
opens what it needs first. Source: the kernel's landlock(7), linux/landlock.h.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from vbus.errors import NotFoundError
from vbus.isolation import kernel

_CREATE_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR = 1 << 4, 1 << 5, 1 << 6, 1 << 7
MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK = 1 << 8, 1 << 9, 1 << 10, 1 << 11
MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV = 1 << 12, 1 << 13, 1 << 14, 1 << 15

_FILES: Final = {1: (1 << 13) - 1, 2: REFER, 3: TRUNCATE, 5: IOCTL_DEV}
"""The rights that each version of the ABI brought."""
_TCP: Final = {4: 0b11}  # bind, connect
_SCOPES: Final = {6: 0b11}  # abstract unix sockets, signals

READ: Final = READ_FILE | READ_DIR | IOCTL_DEV
"""The size of a block device is told by an ioctl."""
WRITE: Final = (
    READ
    | WRITE_FILE
    | REMOVE_DIR
    | REMOVE_FILE
    | MAKE_DIR
    | MAKE_REG
    | MAKE_SOCK
    | MAKE_FIFO
    | TRUNCATE
    | REFER
)
"""No programs are run, no device nodes and no symbolic links are made."""
LISTEN: Final = MAKE_SOCK | REMOVE_FILE
"""In the folder of a unix socket."""
_OF_A_FILE: Final = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV


class _Ruleset(ctypes.Structure):  # struct landlock_ruleset_attr
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scopes", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):  # struct landlock_path_beneath_attr
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """Give the version of the ABI this kernel has, 0 for none."""
    try:
        return kernel.syscall(kernel.LANDLOCK_CREATE_RULESET, 0, 0, _CREATE_VERSION)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return 0


class Ruleset:
    """Rules that are made first and bind later. A context manager: it owns an fd."""

    def __init__(self, version: int, *, sockets: bool = False) -> None:
        """Rule over all that ABI `version` can; with `sockets` not over those."""
        self._files = _upto(_FILES, version)
        rules = _Ruleset(self._files, 0, _upto(_SCOPES, version))
        if not sockets:
            rules.network = _upto(_TCP, version)
        # A kernel takes a structure longer than it knows as long as the rest is 0.
        size = ctypes.sizeof(rules)
        self._fd = kernel.syscall(kernel.LANDLOCK_CREATE_RULESET, rules, size, 0)
        os.set_inheritable(self._fd, False)

    def allow(self, paths: Iterable[Path], rights: int) -> None:
        """Allow `rights` on files, and on folders with all that lies in them.

        Raises NotFoundError for a path that is not there, and OSError.
        """
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                raise NotFoundError(f"isolation: no {path}") from None
            try:
                of_it = rights & self._files
                if not stat.S_ISDIR(os.fstat(fd).st_mode):
                    of_it &= _OF_A_FILE
                rule = _PathBeneath(of_it, fd)
                kernel.syscall(
                    kernel.LANDLOCK_ADD_RULE, self._fd, _RULE_PATH_BENEATH, rule, 0
                )
            finally:
                os.close(fd)

    def restrict_self(self) -> None:
        """Bind this thread, and all it starts, for ever; needs no_new_privs."""
        kernel.syscall(kernel.LANDLOCK_RESTRICT_SELF, self._fd, 0)

    def __enter__(self) -> "Ruleset":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _upto(rights: dict[int, int], version: int) -> int:
    return sum(bits for since, bits in rights.items() if since <= version)
