"""One queue of a device: its set-up by the driver, and its ring while it is in use.

A reset takes the ring away at once. Work that still holds a `LiveRing` (a disk that has
not answered yet) finds it closed: it must not touch the driver's memory any more.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import trio

from backends.venet.flag import Flag
from backends.virtio.constants import QUEUE_SIZE_LIMIT
from backends.virtio.queue import Chain, RingAddresses, VirtQueue
from ioq.aio import AdaptiveSpin
from vbus.errors import BusyError, InvalidError, ProtocolError

SPIN_BATCH = 16


class MalformedError(ProtocolError):
    """A chain has no room for what every request has; the device needs a reset."""


@dataclass(frozen=True)
class QueueSetup:
    """What the driver set; see RingAddresses."""

    size: int
    desc: int = 0
    driver: int = 0
    device: int = 0

    @property
    def addresses(self) -> RingAddresses:
        """Where the ring lies."""
        return RingAddresses(self.desc, self.driver, self.device)


class SavedQueue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A queue's set-up, for another process."""

    enabled: bool
    size: int
    desc: int
    driver: int
    device: int


class LiveRing:
    """A ring in use, until the queue or the device is reset."""

    def __init__(self, core: VirtQueue, spin_us: float = 0) -> None:
        """`spin_us`: how long at most to look for requests before sleeping."""
        self._core = core
        self._spin = AdaptiveSpin(spin_us) if spin_us else None
        self._ahead: Sequence[Chain] = ()
        self._kicked = trio.Event()
        self._alive = True
        core.disable_kicks()

    @property
    def alive(self) -> bool:
        """May the driver's memory still be used?"""
        return self._alive

    def close(self) -> None:
        """The ring is not ours any more."""
        self._alive = False

    def kick(self) -> None:
        """The driver has put something in."""
        self._kicked.set()

    def pop(self, limit: int) -> Sequence[Chain]:
        """Take requests, as many as there are. Raises VirtQueueError."""
        if not self._alive:
            return ()
        if self._ahead:
            found, self._ahead = self._ahead, ()
            return found
        return self._core.pop_batch(limit)

    def push(self, done: Sequence[tuple[Chain, int]]) -> None:
        """Give requests back with the number of bytes written into each."""
        if self._alive and done:
            self._core.push_batch(done)

    def should_notify(self) -> bool:
        """Does the driver want an interrupt for what was pushed?"""
        return self._alive and self._core.should_notify()

    async def wait(self) -> None:
        """Wait until there may be a request; a checkpoint."""
        self._kicked = trio.Event()
        if self._spin is not None:
            began = time.perf_counter_ns()
            if not await self._spin.look(self._look) or not self._alive:
                await self._sleep()
            self._spin.learn(time.perf_counter_ns() - began)
        else:
            await self._sleep()

    def _look(self, duration_ns: int) -> bool:
        end = time.perf_counter_ns() + duration_ns
        while self._alive and not self._ahead and time.perf_counter_ns() < end:
            self._ahead = self._core.pop_batch(SPIN_BATCH)
        return bool(self._ahead) or not self._alive

    async def _sleep(self) -> None:
        if not self._alive or self._core.enable_kicks():
            await trio.lowlevel.checkpoint()
        else:
            await self._kicked.wait()
        if self._alive:
            self._core.disable_kicks()


class DeviceQueue:
    """The registers of one queue; `ring` is there from enable to reset."""

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self.setup = QueueSetup(max_size)
        self.enabled = False
        """The driver said so; it is served only from DRIVER_OK on."""
        self.ring: LiveRing | None = None
        self.serving = Flag()
        self.scope = trio.CancelScope()

    def set_up(
        self,
        *,
        size: int | None = None,
        desc: int | None = None,
        driver: int | None = None,
        device: int | None = None,
        packed: bool = False,
    ) -> None:
        """Change what is given. Raises BusyError when enabled, InvalidError."""
        if self.enabled:
            raise BusyError(f"queue {self.index} is enabled")
        if size is not None:
            power = size & (size - 1) == 0
            if not 0 < size <= min(self.max_size, QUEUE_SIZE_LIMIT) or not (
                power or packed
            ):
                raise InvalidError(f"queue {self.index} cannot have {size} entries")
            self.setup = replace(self.setup, size=size)
        parts = {"desc": desc, "driver": driver, "device": device}
        given = {name: value for name, value in parts.items() if value is not None}
        self.setup = replace(self.setup, **given)

    def saved(self) -> SavedQueue:
        """Say how it is set up."""
        setup = self.setup
        return SavedQueue(
            self.enabled, setup.size, setup.desc, setup.driver, setup.device
        )

    def restore(self, saved: SavedQueue, *, packed: bool) -> None:
        """Be set up like that. Raises InvalidError."""
        self.set_up(
            size=saved.size,
            desc=saved.desc,
            driver=saved.driver,
            device=saved.device,
            packed=packed,
        )
        self.enabled = saved.enabled

    def close(self) -> None:
        """Stop serving it and let go of the ring; the set-up stays."""
        if self.ring is not None:
            self.ring.close()
            self.ring = None
        self.serving.set(False)
        self.scope.cancel()

    def reset(self) -> None:
        """Back to what it was before the driver touched it."""
        self.close()
        self.enabled = False
        self.setup = QueueSetup(self.max_size)

    def start(self, core: VirtQueue, spin_us: float = 0) -> None:
        """Serve it."""
        self.ring = LiveRing(core, spin_us)
        self.serving.set(True)
