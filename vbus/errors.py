"""The one exception tree: every refusal of vbus, each class with its errno."""

import errno as _errno

from ioq.errors import RingFault
from shm.errors import (
    BusyError,
    ExistsError,
    FaultError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    PermissionDeniedError,
    VbusError,
)


class NoDeviceError(VbusError):
    """The device lacks what it needs to work, such as its lower device (ENXIO)."""

    errno = _errno.ENXIO


class CallTimeoutError(VbusError):
    """A device did not answer a call within its deadline (ETIMEDOUT)."""

    errno = _errno.ETIMEDOUT


class ProtocolError(VbusError):
    """The peer broke the protocol; its connection cannot go on (EPROTO)."""

    errno = _errno.EPROTO


class UnreachableError(VbusError):
    """Nobody serves on that socket (ENXIO)."""

    errno = _errno.ENXIO


class ConfigError(InvalidError):
    """A configuration file or value is wrong; the message names the place."""


_CLASSES: dict[int, type[VbusError]] = {
    error.errno: error
    for error in (
        BusyError,
        CallTimeoutError,
        ExistsError,
        FaultError,
        InvalidError,
        NoDeviceError,
        NoSpaceError,
        NotFoundError,
        PermissionDeniedError,
        ProtocolError,
    )
}


def class_of(errno: int) -> type[VbusError]:
    """Give the class for what somebody else refused with `errno`."""
    kind = _CLASSES.get(errno)
    if kind is None:
        kind = _CLASSES[errno] = type("HostError", (VbusError,), {"errno": errno})
    return kind


def innermost(error: BaseException) -> BaseException:
    """Give the first exception that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


__all__ = [
    "BusyError",
    "CallTimeoutError",
    "ConfigError",
    "ExistsError",
    "FaultError",
    "InvalidError",
    "NoDeviceError",
    "NoSpaceError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProtocolError",
    "RingFault",
    "UnreachableError",
    "VbusError",
    "class_of",
    "innermost",
]
