"""What a log line is about: the guest, bus and device it comes from, as fields of it.

    with about(guest="g1", bus="bus0"):
        ...

Every line logged inside, by tasks started inside too, carries these names, whatever
logger it goes through; a device's own lines say which device and guest it was.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

DEVICE: Final[ContextVar[str]] = ContextVar("device")
"""For the path of every call, where `about` would cost too much."""
_NAMES: Final = {
    "guest": ContextVar[str]("guest"),
    "bus": ContextVar[str]("bus"),
    "device": DEVICE,
}


@contextmanager
def about(**names: str) -> Iterator[None]:
    """Bind guest, bus or device to every line that is logged inside."""
    tokens = [(_NAMES[name], _NAMES[name].set(value)) for name, value in names.items()]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def add_about(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Put the names into an event: a structlog processor, for `foreign_pre_chain`."""
    for name, variable in _NAMES.items():
        value = variable.get(None)
        if value is not None:
            event.setdefault(name, value)
    return event
