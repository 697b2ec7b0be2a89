"""What a device sees of a guest: its connection and the memory shared on it.

Made and ended by the bridge; a device only uses them. Nothing here knows which process
the device or the guest is in.
"""

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

import trio

from ioq import AdaptiveSpin, Ring, RingConsumer, RingProducer
from shm import AddressSpace, Doorbell, Locality, ShmSignal, View
from vbus.abi import RING_LIMIT
from vbus.errors import InvalidError, NotFoundError

if TYPE_CHECKING:
    from vbus.device import Device

RING_SIGNAL_OFFSET = 8


class State(Enum):
    """Where a connection is in its life. The order is the only way through."""

    OPENING = "opening"
    """The device still decides; the guest has no handle."""
    ABORTED = "aborted"
    """The guest or the link went away while the device decides: it will be undone."""
    OPEN = "open"
    CLOSING = "closing"
    """The handle is gone, the device still closes; its memory may still be there."""
    CLOSED = "closed"


class Ended(Enum):
    """Why a connection ended."""

    CLOSED = "closed"
    """The guest closed it."""
    RESET = "reset"
    """The guest was reset, negotiated anew or left."""
    UNLINKED = "unlinked"
    """The device left the bus."""
    FAILED = "failed"
    """A hostile ring or a bug of the device."""


class SharedMemory:
    """Memory that a guest shares with a device, with a signal each way or none."""

    __slots__ = (
        "_memory",
        "_post",
        "_ring",
        "_wanted",
        "accepted",
        "cookie",
        "doorbell",
        "flags",
        "handle",
        "id",
        "prio",
        "signal",
        "signal_offset",
        "view",
    )

    def __init__(
        self,
        id: int,
        view: View,
        memory: AddressSpace,
        *,
        flags: int = 0,
        signal_offset: int | None = None,
        prio: int = 0,
        cookie: int = 0,
        post: Callable[[], object] = lambda: None,
        doorbell: Doorbell | None = None,
    ) -> None:
        """Wrap a view; `post` queues the SHMSIGNAL event.

        With a `signal_offset` the signal must be formatted there: InvalidError. Its
        `doorbell` is made if not given.
        """
        self.id = id
        self.view = view
        self.flags = flags
        self.prio = prio
        self.cookie = cookie
        self.signal_offset = signal_offset
        self.handle: int | None = None
        self.signal: ShmSignal | None = None
        self.doorbell: Doorbell | None = None
        self._memory = memory
        self._post = post
        self._ring: Ring | None = None
        self.accepted = False
        self._wanted = False
        if signal_offset is not None:
            self.signal = ShmSignal(view, signal_offset, Locality.SOUTH, self.notify)
            self.doorbell = Doorbell() if doorbell is None else doorbell

    def __repr__(self) -> str:
        return f"<SharedMemory {self.id}: {self.view.size} bytes>"

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.view.size

    def notify(self) -> None:
        """Queue this memory's one SHMSIGNAL event; the signal calls this.

        Held back until the guest knows that the memory is shared: no event may carry
        the cookie of a DEVSHM that fails (ABI 10.2).
        """
        if self.accepted:
            self._post()
        else:
            self._wanted = True

    def ring(self, *, limit: int = RING_LIMIT) -> Ring:
        """Attach to the IOQ that fills this memory, once. Raises InvalidError."""
        if self._ring is None:
            if self.signal_offset != RING_SIGNAL_OFFSET:
                raise InvalidError(
                    f"memory {self.id} is shared without a ring's signal"
                )
            self._ring = Ring(
                self.view, self._memory, Locality.SOUTH, self.notify, limit=limit
            )
        return self._ring

    def woken(self) -> Doorbell:
        """Give the doorbell the guest rings. Raises InvalidError without a signal."""
        if self.doorbell is None:
            raise InvalidError(f"memory {self.id} is shared without a signal")
        return self.doorbell

    # For the bridge

    def accept(self) -> None:
        """The device took it and the guest will be told: signals may go out."""
        self.accepted = True
        if self._wanted:
            self._post()

    def release(self) -> None:
        """End all use of the memory; safe to repeat."""
        self._post = lambda: None
        if self.doorbell is not None:
            self.doorbell.close()
        self.view.close()


class Connection:
    """One open device of one guest."""

    __slots__ = (
        "__weakref__",
        "_arrivals",
        "_state",
        "area",
        "device",
        "ended",
        "guest",
        "handle",
        "memory",
        "save",
        "sharing",
        "shm",
        "version",
    )

    def __init__(
        self, device: "Device", guest: str, version: int, memory: AddressSpace
    ) -> None:
        self.device = device
        self.guest = guest
        self.version = version
        self.memory = memory
        self.handle = 0
        self.ended: Ended | None = None
        self.shm: dict[int, SharedMemory] = {}
        self.sharing: dict[int, SharedMemory] = {}
        self.area: AddressSpace | None = None
        """Memory that outlives this process, `Device.area_size` bytes from 0 on: of a
        transparent device in a backend."""
        self.save: Callable[[], object] = lambda: None
        """Have `Device.save` asked now."""
        self._state = State.OPENING
        self._arrivals: dict[int, trio.Event] = {}

    def __repr__(self) -> str:
        return f"<Connection {self.guest} to {self.device.name}: {self._state.value}>"

    @property
    def id(self) -> int:
        """The handle the guest names it by; 0 while the device still decides."""
        return self.handle

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        if state in (State.CLOSING, State.CLOSED):
            for arrival in self._arrivals.values():
                arrival.set()

    async def shared(self, id: int) -> SharedMemory:
        """Wait until the guest shares memory under `id`.

        Raises NotFoundError when the connection ends before that.
        """
        if id not in self.shm and self._state in (State.OPENING, State.OPEN):
            await self._arrivals.setdefault(id, trio.Event()).wait()
        try:
            return self.shm[id]
        except KeyError:
            raise NotFoundError(f"{self}: ended before {id} was shared") from None

    async def ring(self, id: int, *, limit: int = RING_LIMIT) -> Ring:
        """Wait for memory `id` and attach to the ring in it. Raises InvalidError."""
        return (await self.shared(id)).ring(limit=limit)

    async def consumer(
        self, id: int, *, limit: int = RING_LIMIT, spin: AdaptiveSpin | None = None
    ) -> RingConsumer:
        """Wait for ring `id`, which the guest fills. Raises as `ring`."""
        shm = await self.shared(id)
        return RingConsumer(shm.ring(limit=limit), shm.woken(), spin)

    async def producer(
        self, id: int, *, limit: int = RING_LIMIT, spin: AdaptiveSpin | None = None
    ) -> RingProducer:
        """Wait for ring `id`, which the device fills. Raises as `ring`."""
        shm = await self.shared(id)
        return RingProducer(shm.ring(limit=limit), shm.woken(), spin)

    # For the bridge

    def add(self, shm: SharedMemory) -> None:
        """List memory that the device accepted and wake who waits for it."""
        self.shm[shm.id] = shm
        arrival = self._arrivals.pop(shm.id, None)
        if arrival is not None:
            arrival.set()
