"""Refusals of the host as exceptions of the one tree."""

import errno as _errno

from vbus import errors
from vbus.errors import VbusError
from vbus.vfio_user.wire import error_name


class UnreachableError(VbusError):
    """Nobody serves a bridge on that socket (ENXIO)."""

    errno = _errno.ENXIO


_CLASSES: dict[int, type[VbusError]] = {
    error.errno: error
    for error in (
        errors.BusyError,
        errors.CallTimeoutError,
        errors.ExistsError,
        errors.FaultError,
        errors.InvalidError,
        errors.NoDeviceError,
        errors.NoSpaceError,
        errors.NotFoundError,
        errors.PermissionDeniedError,
        errors.ProtocolError,
    )
}


def refusal(code: int, what: str) -> VbusError:
    """Make the exception for `what`, which the host refused with errno `code`."""
    kind = _CLASSES.get(code)
    if kind is None:
        kind = type("HostError", (VbusError,), {"errno": code})
        _CLASSES[code] = kind
    return kind(f"{what}: {error_name(code)}")


def again(error: VbusError) -> VbusError:
    """Copy an error that several tasks raise, so that each has its own traceback."""
    return type(error)(*error.args)
