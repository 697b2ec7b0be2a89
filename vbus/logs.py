"""What a log line is about: the guest, bus and device it comes from, as fields of it.

    with about(guest="g1", bus="bus0"):
        ...

Every line logged inside, by tasks started inside too, carries these names, whatever
logger it goes through; a device's own lines say which device and guest it was.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_ABOUT: ContextVar[Mapping[str, str]] = ContextVar("vbus_about")
_NOTHING: Mapping[str, str] = {}


@contextmanager
def about(**names: str) -> Iterator[None]:
    """Bind names to every line that is logged inside."""
    token = _ABOUT.set({**_ABOUT.get(_NOTHING), **names})
    try:
        yield
    finally:
        _ABOUT.reset(token)


def add_about(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Put the names into an event: a structlog processor, for `foreign_pre_chain`."""
    for name, value in _ABOUT.get(_NOTHING).items():
        event.setdefault(name, value)
    return event
