"""Bringing a virtio device up, and watching it (virtio 1.2, 3.1.1)."""

from collections.abc import Callable

import trio

from proxy.virtio.queue import Virtqueue
from proxy.virtio.transport import Identity, Transport
from vbus.errors import InvalidError, NotFoundError, ProtocolError
from vbus.virtio.common import Ring, Status, bits

RINGS = bits(Ring.VERSION_1, Ring.INDIRECT_DESC, Ring.EVENT_IDX)


class VirtioDevice:
    """One device from reset to DRIVER_OK; `features` are those both sides take."""

    def __init__(self, transport: Transport, identity: Identity) -> None:
        self.transport = transport
        self.identity = identity
        self.features = 0
        self.queues: dict[int, Virtqueue] = {}

    @property
    def name(self) -> str:
        return self.transport.name

    def has(self, bit: int) -> bool:
        """Was the feature negotiated?"""
        return bool(self.features >> bit & 1)

    async def negotiate(self, wanted: int, *, packed: bool = False) -> None:
        """Reset the device and settle the features, those of the ring included.

        Raises InvalidError for a device without VERSION_1, ProtocolError if it refuses
        what it offered.
        """
        transport = self.transport
        if await transport.set_status(0):
            raise ProtocolError(f"{self.name} does not reset")
        await transport.set_status(Status.ACKNOWLEDGE)
        await transport.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        wanted |= RINGS | (bits(Ring.PACKED) if packed else 0)
        features = await transport.offered() & wanted
        if not features >> Ring.VERSION_1 & 1:
            await transport.set_status(Status.FAILED)
            raise InvalidError(f"{self.name} is a legacy device")
        await transport.accept(features)
        settled = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        if not await transport.set_status(settled) & Status.FEATURES_OK:
            await transport.set_status(Status.FAILED)
            raise ProtocolError(f"{self.name} refuses the features {features:#x}")
        self.features = features

    async def open_queue(self, index: int, size: int, *, entries: int = 0) -> Virtqueue:
        """Make a queue, before `ready`. Raises NotFoundError if there is none."""
        if index >= self.identity.queues:
            raise NotFoundError(f"{self.name} has no queue {index}")
        queue = await Virtqueue.open(
            self.transport, index, self.features, size=size, entries=entries
        )
        self.queues[index] = queue
        return queue

    async def ready(self) -> None:
        """Let the device go. Raises ProtocolError if it breaks at once."""
        live = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        status = await self.transport.set_status(live | Status.DRIVER_OK)
        self._check(status)

    async def watch(self, changed: Callable[[], object] = lambda: None) -> None:
        """Call `changed` when the configuration may have changed, until cancelled.

        Raises ProtocolError when the device needs a reset.
        """
        while True:
            await self.transport.config_changed.wait()
            self.transport.config_seen()
            self._check(await self.transport.status())
            changed()

    def _check(self, status: int) -> None:
        if status & Status.NEEDS_RESET:
            raise ProtocolError(f"{self.name} needs a reset: a queue of ours was bad")

    async def stop(self) -> None:
        """Reset it: the device lets go of our memory."""
        with trio.CancelScope(shield=True):
            await self.transport.set_status(0)
