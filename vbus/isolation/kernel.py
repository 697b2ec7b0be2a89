"""The system calls of isolation that Python has no name for, through ctypes."""

import ctypes
import os
from typing import Final

_LIBC = ctypes.CDLL(None, use_errno=True)

# One number on every machine: they were added after the tables were unified.
LANDLOCK_CREATE_RULESET: Final = 444
LANDLOCK_ADD_RULE: Final = 445
LANDLOCK_RESTRICT_SELF: Final = 446

PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_NO_NEW_PRIVS: Final = 39


def syscall(number: int, *arguments: "int | ctypes.Structure | None") -> int:
    """Call the kernel; a structure goes by its address. Raises OSError."""
    words = [
        ctypes.byref(one) if isinstance(one, ctypes.Structure) else _word(one)
        for one in arguments
    ]
    return _checked(_LIBC.syscall(ctypes.c_long(number), *words))


def prctl(option: int, *arguments: "int | ctypes.Structure") -> int:
    """Call prctl(2), with zeros for the arguments that are not given."""
    words = [
        ctypes.byref(one) if isinstance(one, ctypes.Structure) else _word(one)
        for one in arguments
    ]
    words += [_word(0)] * (4 - len(words))
    return _checked(_LIBC.prctl(ctypes.c_int(option), *words))


def _word(value: int | None) -> ctypes.c_ulong:
    return ctypes.c_ulong(value or 0)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
