"""What can go wrong with a virtual machine that is being run."""

import errno as _errno

from vbus.errors import VbusError


class GuestError(VbusError):
    """A machine or what runs in it failed; the message ends with the console's end."""

    errno = _errno.EIO


class GuestGoneError(GuestError):
    """The guest powered off, panicked, was reset or killed while it was needed."""

    errno = _errno.EHOSTDOWN


class GuestTimeoutError(GuestError):
    """The guest did not do it in time."""

    errno = _errno.ETIMEDOUT


class GuestCommandError(GuestError):
    """A program in the guest ended with another status than 0."""


class GuestPythonError(GuestError):
    """Python in the guest raised. `traceback` is the guest's."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(f"{message}\n{traceback}")
        self.traceback = traceback


class QmpError(GuestError):
    """QEMU refused a command. `kind` is its class, such as "GenericError"."""

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(f"{kind}: {description}")
        self.kind = kind
