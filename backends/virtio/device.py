"""What every virtio device is (virtio 1.2, section 2), without a transport.

The states, by the status bits the driver writes:

    reset --ACKNOWLEDGE, DRIVER--> negotiating --FEATURES_OK--> set-up
    set-up --DRIVER_OK--> live --broken queue--> needs reset
    any state --0--> reset
    FEATURES_OK stays clear when the accepted features break a rule; DRIVER_OK stays
    clear before FEATURES_OK. A legacy driver has no FEATURES_OK: its features are
    taken at DRIVER_OK, less what lacks its dependencies.

A transport turns registers or calls into the plain methods below, none of which waits,
and is told of interrupts through `VirtioTransport`. `run` is the device's one task.
A reset is complete when `set_status(0)` returns, in every state: nothing touches the
driver's memory any more. Work that is still under way outside (a disk write) is waited
for before the device serves its next driver.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import trio

from backends.venet.flag import Flag
from backends.virtio.config import ConfigSpace
from backends.virtio.constants import (
    LEGACY_MASK,
    RING_FEATURES,
    DeviceId,
    Ring,
    Status,
)
from backends.virtio.device_queue import (
    DeviceQueue,
    LiveRing,
    MalformedError,
    QueueSetup,
)
from backends.virtio.features import Dependencies, closed, refusal
from backends.virtio.queue import Chain, RingAddresses, VirtQueue
from backends.virtio.saved import Records, Saved
from shm import AddressSpace
from vbus.errors import InvalidError, NotFoundError, VbusError, innermost

BATCH = 64


class VirtioTransport(Protocol):
    """What a device needs of the way it is shown to a driver."""

    @property
    def space(self) -> AddressSpace:
        """The driver's memory, by the addresses it gives."""
        ...

    @property
    def records(self) -> Records | None:
        """Where queues keep what is in flight, if that is to outlive this process."""
        ...

    def save(self) -> None:
        """The device changed other than by what the transport asked: save it."""
        ...

    def queue_interrupt(self, index: int) -> None:
        """Tell the driver that a queue has used buffers."""
        ...

    def config_interrupt(self) -> None:
        """Tell the driver that the configuration or DEVICE_NEEDS_RESET changed."""
        ...


@dataclass(frozen=True)
class VirtioStatistics:
    """A device's life so far; `refusal` is why features were refused last."""

    status: int
    features: int
    resets: int
    breaks: int
    interrupts: int
    broken: str | None
    refusal: str | None


class VirtioDevice:
    """A device model: subclass it, and say what to do with a queue's chains."""

    device_id: ClassVar[DeviceId]
    dependencies: ClassVar[Dependencies] = {}

    def __init__(
        self,
        queue_sizes: Sequence[int],
        *,
        features: int = 0,
        config: ConfigSpace | None = None,
    ) -> None:
        """`features` are the device's own, without the rings'."""
        self.queues = [DeviceQueue(n, size) for n, size in enumerate(queue_sizes)]
        self.config = config if config is not None else ConfigSpace()
        self._own = closed(features, self.dependencies) | RING_FEATURES
        self.offered = self._own
        """The device's features and the transport's."""
        self.spin_us = 0.0
        """How long at most a queue looks for requests before it sleeps: a transport's
        to set."""
        self.legacy = False
        """A transport sets it, before DRIVER_OK, for a driver that speaks legacy."""
        self.status = Status(0)
        self.accepted = 0
        """What the driver wrote; `features` once they hold."""
        self.features = 0
        self.broken: str | None = None
        self._transport: VirtioTransport | None = None
        self._live = Flag()
        self._scope = trio.CancelScope()
        self._refusal: str | None = None
        self._resets = self._breaks = self._interrupts = 0

    # For a transport

    def attach(self, transport: VirtioTransport, *, features: int = 0) -> None:
        """Show the device on a transport, which may offer `features` of its own.

        A reset, too. Raises InvalidError when it is shown elsewhere.
        """
        if self._transport is not None:
            raise InvalidError("the device is on a transport already")
        self.offered = self._own | features
        self._transport = transport
        self.reset()

    def detach(self) -> None:
        """Take it off its transport; a reset, too."""
        self.reset()
        self.offered = self._own
        self._transport = None

    def queue(self, index: int) -> DeviceQueue:
        """Give a queue's set-up. Raises NotFoundError."""
        if not 0 <= index < len(self.queues):
            raise NotFoundError(f"there is no queue {index}")
        return self.queues[index]

    def set_features(self, accepted: int) -> None:
        """Take the driver's features; ignored once they are settled."""
        if not self.status & (Status.FEATURES_OK | Status.DRIVER_OK):
            self.accepted = accepted

    def set_status(self, value: int) -> None:
        """Take the status the driver writes; 0 is a reset. It cannot clear bits."""
        if value == 0:
            self.reset()
            return
        wanted = Status(value & 0xFF) & ~Status.NEEDS_RESET
        new = wanted & ~self.status
        if Status.FEATURES_OK in new and not self._settle_features():
            new &= ~Status.FEATURES_OK
        ready = self.legacy or Status.FEATURES_OK in (self.status | new)
        if Status.DRIVER_OK in new and not ready:
            new &= ~Status.DRIVER_OK
        self.status |= new
        if Status.FAILED in new:
            self._stop()
        elif Status.DRIVER_OK in new:
            self._start()

    def enable_queue(self, index: int) -> None:
        """Let a queue be used: from DRIVER_OK on, or now if that was.

        Raises NotFoundError; a ring that cannot be made breaks the device.
        """
        queue = self.queue(index)
        if queue.enabled:
            return
        queue.enabled = True
        if self._live.value:
            self._start_queue(queue)

    def reset_queue(self, index: int) -> None:
        """Reset one queue (RING_RESET); complete when this returns.

        Raises NotFoundError.
        """
        self.queue(index).reset()
        self.queue_stopped(self.queue(index))

    def kick(self, index: int) -> None:
        """The driver notified a queue; one that is not in use ignores it."""
        if 0 <= index < len(self.queues):
            ring = self.queues[index].ring
            if ring is not None:
                ring.kick()

    def read_config(self, offset: int, size: int) -> bytes:
        """Read the configuration."""
        return self.config.read(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write the configuration (into the scratch copy if it has the latch)."""
        live = Status.DRIVER_OK in self.status
        for name in self.config.write(offset, data, driver_ok=live):
            self.config_written(name)

    def commit_config(self) -> None:
        """Commit what was written, for a transport with the latch (R25)."""
        for name in self.config.commit():
            self.config_written(name)

    def reset(self) -> None:
        """Be as new. Never waits, never fails."""
        self._stop()
        self.status = Status(0)
        self.accepted = self.features = 0
        self.legacy = False
        self.broken = self._refusal = None
        self.config.sealed = False
        self.config.forget_writes()
        for queue in self.queues:
            queue.reset()
        self._resets += 1
        self.was_reset()

    def saved(self) -> Saved:
        """Say how the device stands, but for what is in flight."""
        return Saved(
            status=int(self.status),
            accepted=self.accepted,
            features=self.features,
            broken=self.broken,
            generation=self.config.generation,
            config=self.config.read(0, self.config.size),
            queues=tuple(queue.saved() for queue in self.queues),
            extra=self.extra(),
        )

    def restore(self, saved: Saved) -> None:
        """Go on as another process stood, on a transport just attached.

        Raises VbusError for what this device could not have been.
        """
        if len(saved.queues) != len(self.queues) or saved.features & ~self.offered:
            raise InvalidError("the state is one of another device")
        self.status = Status(saved.status)
        self.accepted, self.features = saved.accepted, saved.features
        self.config.restore(saved.config, saved.generation)
        for queue, each in zip(self.queues, saved.queues, strict=True):
            queue.restore(each, packed=self.has(Ring.PACKED))
        self.restore_extra(saved.extra)
        self.broken = saved.broken
        if Status.DRIVER_OK in self.status and self.broken is None:
            self._start(resume=True)

    # For models

    def has(self, bit: int) -> bool:
        """Was the feature negotiated?"""
        return bool(self.features >> bit & 1)

    def complete(self, index: int, ring: LiveRing, chain: Chain, written: int) -> None:
        """Give one chain back, and interrupt if the driver wants that."""
        self.complete_batch(index, ring, [(chain, written)])

    def complete_batch(
        self, index: int, ring: LiveRing, done: Sequence[tuple[Chain, int]]
    ) -> None:
        """Give chains back, with one interrupt if the driver wants it."""
        ring.push(done)
        self.interrupt(index, ring)

    def interrupt(self, index: int, ring: LiveRing) -> None:
        """Interrupt for what was pushed, if the driver wants that."""
        if self._transport is not None and ring.should_notify():
            self._interrupts += 1
            self._transport.queue_interrupt(index)

    def change_config(self, **values: int | bytes) -> None:
        """Change fields from the device's side, and tell a driver that is there."""
        changed = [
            name for name, value in values.items() if self.config.set(name, value)
        ]
        if changed and Status.DRIVER_OK in self.status:
            self._config_interrupt()

    def fail(self, reason: str) -> None:
        """Stop until the driver resets the device: DEVICE_NEEDS_RESET."""
        if self.broken is not None:
            return
        self.broken = reason
        self._breaks += 1
        self._stop()
        self.status |= Status.NEEDS_RESET
        self.save()
        if Status.DRIVER_OK in self.status:
            self._config_interrupt()

    def save(self) -> None:
        """What `saved` gives changed, and no call of the driver's is the reason."""
        if self._transport is not None:
            self._transport.save()

    # Hooks

    def extra(self) -> bytes:
        """Give what a model adds to `saved`."""
        return b""

    def restore_extra(self, extra: bytes) -> None:
        """Take it back. Raises VbusError."""

    def config_written(self, name: str) -> None:
        """React to a driver's write to a field."""

    def was_reset(self) -> None:
        """React to a reset."""

    def started(self) -> None:
        """React to DRIVER_OK: features are settled, rings are there."""

    def queue_stopped(self, queue: DeviceQueue) -> None:
        """Forget what was taken from a queue."""

    async def background(self) -> None:
        """Run while a driver is there."""

    async def drive(self, queue: DeviceQueue, ring: LiveRing) -> None:
        """Serve a queue until cancelled. The default drains it into `handle`."""
        while True:
            chains = ring.pop(BATCH)
            if chains:
                await self.handle(queue, ring, chains)
            else:
                await ring.wait()

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        """Answer chains; must be a checkpoint."""
        raise NotImplementedError

    # The task

    async def run(self) -> None:
        """Be the device until cancelled."""
        while True:
            await self._live.wait(True)
            with trio.CancelScope() as self._scope:
                await self._serve()

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            for queue in self.queues:
                nursery.start_soon(self._serve_queue, queue)
            nursery.start_soon(self.background)

    async def _serve_queue(self, queue: DeviceQueue) -> None:
        while True:
            await queue.serving.wait(True)
            ring = queue.ring
            assert ring is not None
            with trio.CancelScope() as queue.scope:
                try:
                    await self.drive(queue, ring)
                except* VbusError as errors:
                    if ring.alive:
                        self.fail(f"queue {queue.index}: {innermost(errors)}")

    # Inside

    def _settle_features(self) -> bool:
        self._refusal = refusal(self.offered, self.accepted, self.dependencies)
        if self._refusal is None:
            self.features = self.accepted
        return self._refusal is None

    def _start(self, *, resume: bool = False) -> None:
        if self.legacy:
            accepted = self.accepted & self.offered & LEGACY_MASK
            self.features = closed(accepted, self.dependencies)
        self.config.sealed = True
        self._live.set(True)
        for queue in self.queues:
            if queue.enabled and self._live.value:
                self._start_queue(queue, resume=resume)
        if self._live.value:
            self.started()

    def _start_queue(self, queue: DeviceQueue, *, resume: bool = False) -> None:
        assert self._transport is not None
        setup, records = queue.setup, self._transport.records
        try:
            core = VirtQueue(
                self._transport.space,
                setup.size,
                setup.addresses,
                self.features,
                record=None if records is None else records.of(queue),
                resume=resume,
            )
        except VbusError as error:
            self.fail(f"queue {queue.index}: {error}")
        else:
            queue.start(core, self.spin_us)

    def _stop(self) -> None:
        self._live.set(False)
        self._scope.cancel()
        for queue in self.queues:
            queue.close()
            self.queue_stopped(queue)

    def _config_interrupt(self) -> None:
        if self._transport is not None:
            self._interrupts += 1
            self._transport.config_interrupt()

    def statistics(self) -> VirtioStatistics:
        """A snapshot of the state and counters."""
        return VirtioStatistics(
            status=int(self.status),
            features=self.features,
            resets=self._resets,
            breaks=self._breaks,
            interrupts=self._interrupts,
            broken=self.broken,
            refusal=self._refusal,
        )


__all__ = [
    "BATCH",
    "Chain",
    "DeviceQueue",
    "LiveRing",
    "MalformedError",
    "QueueSetup",
    "RingAddresses",
    "VirtQueue",
    "VirtioDevice",
    "VirtioStatistics",
    "VirtioTransport",
]
