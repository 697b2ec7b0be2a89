"""What a round finds: both kinds of guest give the same."""

from dataclasses import dataclass, field

import msgspec
import trio

from vbus.errors import innermost

Values = dict[str, float]
IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128)
"""Messages under way at once, where load is tried."""


@dataclass(slots=True)
class Round:
    """What one round found; `loads` by messages under way."""

    values: Values = field(default_factory=dict)
    loads: dict[int, Values] = field(default_factory=dict)


class Outcome(msgspec.Struct, forbid_unknown_fields=True):
    """What a process that did a round says of it: what it found, or why it stopped."""

    found: Round | None = None
    stopped: str = ""


def reason(error: BaseException) -> str:
    """Say why a round could not be."""
    cause = innermost(error)
    return "it took too long" if isinstance(cause, trio.TooSlowError) else str(cause)
