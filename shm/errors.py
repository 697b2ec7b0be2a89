"""The root of the one exception tree of vbus.

It lies here because this is the lowest layer; `vbus.errors` is where users find the
whole tree. Every class carries the errno that a guest sees for it.
"""

import errno as _errno
from typing import ClassVar


class VbusError(Exception):
    """Something vbus refuses or could not do; `errno` is its code at the guest ABI."""

    errno: ClassVar[int] = _errno.EIO


class InvalidError(VbusError, ValueError):
    """A value is outside what the interface allows (EINVAL)."""

    errno = _errno.EINVAL


class FaultError(VbusError):
    """An address range is not (or no longer) memory of the guest (EFAULT)."""

    errno = _errno.EFAULT


class ExistsError(VbusError):
    """The name, id or address range is already taken (EEXIST)."""

    errno = _errno.EEXIST


class NotFoundError(VbusError, LookupError):
    """No such name, id or handle (ENOENT)."""

    errno = _errno.ENOENT


class BusyError(VbusError):
    """The thing is in use (EBUSY)."""

    errno = _errno.EBUSY


class PermissionDeniedError(VbusError):
    """The caller may not do this (EPERM)."""

    errno = _errno.EPERM


class NoSpaceError(VbusError):
    """A table, pool or id space is used up (ENOSPC)."""

    errno = _errno.ENOSPC
