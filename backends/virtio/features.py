"""Feature negotiation as rules over feature words (virtio 1.2, 2.2 and 6.1)."""

from collections.abc import Mapping
from typing import TypeAlias

from backends.virtio.constants import Ring

Dependencies: TypeAlias = Mapping[int, tuple[int, ...]]
"""Bit number -> bit numbers of which at least one must be there too."""


def unmet(accepted: int, dependencies: Dependencies) -> int | None:
    """Give the first accepted bit without what it depends on."""
    for bit, needed in sorted(dependencies.items()):
        if accepted >> bit & 1 and not any(accepted >> n & 1 for n in needed):
            return bit
    return None


def refusal(offered: int, accepted: int, dependencies: Dependencies) -> str | None:
    """Say why FEATURES_OK stays clear for a driver that accepted this; None: it is set.

    A driver that knows FEATURES_OK knows VERSION_1, so it must have accepted it.
    """
    if accepted & ~offered:
        return f"features {accepted & ~offered:#x} were not offered"
    if not accepted >> Ring.VERSION_1 & 1:
        return "VERSION_1 was not accepted"
    bit = unmet(accepted, dependencies)
    if bit is not None:
        return f"feature {bit} needs one of {dependencies[bit]}"
    return None


def closed(accepted: int, dependencies: Dependencies) -> int:
    """Drop what lacks its dependencies.

    For what we offer, and for a legacy driver, which we have no way to refuse.
    """
    while (bit := unmet(accepted, dependencies)) is not None:
        accepted &= ~(1 << bit)
    return accepted
