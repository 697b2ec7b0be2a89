"""Installing a seccomp filter, and whether this kernel can."""

import ctypes
from typing import Final

from vbus.isolation.kernel import prctl

_PR_GET_SECCOMP: Final = 21
_PR_SET_SECCOMP: Final = 22
_MODE_FILTER: Final = 2
_INSTRUCTION_SIZE: Final = 8
_EFAULT: Final = 14


class _Program(ctypes.Structure):  # struct sock_fprog
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def available() -> bool:
    """Has this kernel filters? Changes nothing.

    A kernel with filters looks at the program's address and finds that it is none
    (EFAULT); one without says EINVAL before it looks (seccomp(2)).
    """
    try:
        prctl(_PR_SET_SECCOMP, _MODE_FILTER, 0)
    except OSError as error:
        return error.errno == _EFAULT
    return False


def install(program: bytes) -> None:
    """Filter all further system calls of this thread, for ever. Raises OSError."""
    length = len(program) // _INSTRUCTION_SIZE
    prctl(_PR_SET_SECCOMP, _MODE_FILTER, _Program(length, program))
