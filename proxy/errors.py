"""Refusals of the host as exceptions of the one tree."""

from vbus.errors import VbusError, class_of
from vbus.vfio_user.wire import error_name


def refusal(code: int, what: str) -> VbusError:
    """Make the exception for `what`, which the host refused with errno `code`."""
    return class_of(code)(f"{what}: {error_name(code)}")


def again(error: VbusError) -> VbusError:
    """Copy an error that several tasks raise, so that each has its own traceback."""
    return type(error)(*error.args)
