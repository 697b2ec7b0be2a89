"""A bus and the bridge of one guest, for tests that look at every effect."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from vbus.bridge import CALL_TIMEOUT_S, Bridge
from vbus.bus import Bus, BusModel, Interface
from vbus.client import random_handle
from vbus.device import Device
from vbus.testing.effects import RecordedEffects
from vbus.testing.peer import GuestPeer


class RecordedBridge:
    """A model with one bus, the bridge of one guest there, its effects and its peer.

    A context manager; `check` verifies every invariant, and leaving does it too.
    """

    def __init__(
        self,
        classes: Mapping[str, type[Device]] | None = None,
        *,
        model: BusModel | None = None,
        bus: Bus | None = None,
        effects: RecordedEffects | None = None,
        msix: bool = True,
        call_timeout_s: float = CALL_TIMEOUT_S,
        new_handle: Callable[[], int] = random_handle,
    ) -> None:
        """Make what is not given and attach the peer.

        `classes` is what the model knows; a `bus` lets several guests share one.
        """
        self.model = BusModel(classes or {}) if model is None else model
        self.bus = self.model.add_bus("test") if bus is None else bus
        self.effects = RecordedEffects() if effects is None else effects
        self.bridge = Bridge(
            self.bus,
            self.effects,
            name="guest",
            msix=msix,
            call_timeout_s=call_timeout_s,
            new_handle=new_handle,
        )
        self.peer = GuestPeer(self.bridge)
        self.peer.attach()

    def add(self, name: str, class_name: str, **attributes: object) -> Interface:
        """Make a device and put it on the bus."""
        self.model.add_device(name, class_name, attributes)
        return self.model.link(self.bus.name, name)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        self.bridge.validate()
        opened, closed = self.effects.opened, self.effects.closed
        ended = {connection for connection, _ in closed}
        assert set(self.bridge.connections) == set(opened) - ended

    def close(self) -> None:
        """Remove the guest and free its memory."""
        self.check()
        self.bridge.close()
        self.bridge.validate()
        self.peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.bridge.close()
            self.peer.close()
