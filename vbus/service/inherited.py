"""Descriptors that came with the process: socket activation and the descriptor store.

The manager (or our own predecessor, see `vbus.service.restart`) puts them at 3, 4, ...
and says so in $LISTEN_PID, $LISTEN_FDS and $LISTEN_FDNAMES: sd_listen_fds(3).
"""

import os
from collections.abc import MutableMapping
from typing import Final, NamedTuple

from vbus.errors import ConfigError

FIRST: Final = 3
UNNAMED: Final = "unknown"
"""What the manager itself says where there is no name."""


class Inherited(NamedTuple):
    """One descriptor, which whoever holds this must close or pass on."""

    name: str
    fd: int


def take(environment: MutableMapping[str, str]) -> list[Inherited]:
    """Take what is meant for this process, and the variables out of `environment`.

    The descriptors are closed on exec from now on. Raises ConfigError for variables
    that mean nothing or descriptors that are not there.
    """
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", None)
    try:
        if not pid or int(pid) != os.getpid():
            return []
        fds = range(FIRST, FIRST + int(count))
    except ValueError:
        raise ConfigError(f"LISTEN_PID={pid!r} LISTEN_FDS={count!r}") from None
    named = [UNNAMED] * len(fds) if names is None else names.split(":")
    if len(named) != len(fds):
        raise ConfigError(f"LISTEN_FDNAMES={names!r} for {len(fds)} descriptors")
    try:
        for fd in fds:
            os.set_inheritable(fd, False)
    except OSError as error:
        raise ConfigError(f"LISTEN_FDS={count!r}: {fd}: {error.strerror}") from None
    return [Inherited(name, fd) for name, fd in zip(named, fds, strict=True)]
