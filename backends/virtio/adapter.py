"""The device type "virtio": a model behind the bridge (R13, ABI section 9.3).

What a driver does by registers elsewhere it does here by calls, and its virtqueues lie
in memory it shares: DEVSHM of id *i* brings the memory of queue *i* and its signal. To
signal the device is to kick the queue, and the device signals for used buffers.
"""

from contextlib import suppress
from dataclasses import dataclass

import trio

from backends.virtio.constants import Ring, Status
from backends.virtio.device import VirtioDevice
from backends.virtio.pci import function
from shm import AddressSpace
from vbus.device import Connection, Device, SharedMemory, call
from vbus.errors import (
    BusyError,
    ExistsError,
    FaultError,
    InvalidError,
)
from vbus.pci.function import PciFunction
from vbus.virtio import adapter as abi

VENDOR = 0x11DA
_WORD = 0xFFFF_FFFF
_SPLIT_DRIVER, _SPLIT_DEVICE, _EVENT_AREA = 6, 6, 4


@dataclass(frozen=True)
class AdapterStatistics:
    """Kicks that reached the device; signals and those that crossed to the guest."""

    kicks: int
    signals: int
    crossed: int


class Session:
    """One guest's connection: the transport that the model is on."""

    def __init__(self, connection: Connection, model: VirtioDevice) -> None:
        self.space: AddressSpace = connection.memory
        self.kicks = 0
        self._model = model
        self._shared: dict[int, SharedMemory] = {}
        self._accepted = [0] * abi.FEATURE_WORDS
        self._arrived, self._arrivals = trio.open_memory_channel[SharedMemory](
            abi.MAX_QUEUES + 1
        )

    # What the model asks for

    def queue_interrupt(self, index: int) -> None:
        self._signal(index)

    def config_interrupt(self) -> None:
        self._signal(abi.CONFIG_SHM)

    def _signal(self, id: int) -> None:
        shm = self._shared.get(id)
        if shm is None or shm.signal is None:
            return
        with suppress(FaultError):  # who takes the memory away does not listen
            shm.signal.inject()

    # Shared memory

    def share(self, shm: SharedMemory) -> None:
        """Take the memory of a queue, or of the configuration's signal."""
        if shm.id != abi.CONFIG_SHM and not 0 <= shm.id < len(self._model.queues):
            raise InvalidError(f"no memory has the id {shm.id}")
        if shm.id in self._shared:
            raise ExistsError(f"memory {shm.id} is shared already")
        if shm.signal is None:
            raise InvalidError(f"memory {shm.id} needs a signal")
        self._shared[shm.id] = shm
        if shm.id != abi.CONFIG_SHM:
            shm.signal.enable()
            self._arrived.send_nowait(shm)

    async def run(self) -> None:
        """Hear kicks until cancelled."""
        async with trio.open_nursery() as nursery:
            async for shm in self._arrivals:
                nursery.start_soon(self._listen, shm)

    async def _listen(self, shm: SharedMemory) -> None:
        """The wakeup of ABI section 7, whose handler is the kick."""
        signal, doorbell = shm.signal, shm.woken()
        assert signal is not None
        try:
            while True:
                signal.wakeup_begin()
                self.kicks += 1
                self._model.kick(shm.id)
                if not signal.wakeup_end():
                    await doorbell.wait()
        except FaultError:
            self._model.fail(f"queue {shm.id}: its memory is gone")

    # Calls

    def set_features(self, select: int, word: int) -> None:
        """Take 32 of the features that the driver accepts."""
        if select < abi.FEATURE_WORDS:
            self._accepted[select] = word
        elif word:
            raise InvalidError(f"there are no features {32 * select} and above")
        self._model.set_features(
            sum(each << 32 * n for n, each in enumerate(self._accepted))
        )

    def set_status(self, value: int) -> int:
        """Write the status: what it is then."""
        if value > 0xFF:
            raise InvalidError(f"a status of {value:#x} has more than 8 bits")
        if value == 0:
            self._accepted = [0] * abi.FEATURE_WORDS
        self._model.set_status(value)
        return int(self._model.status)

    def enable_queue(
        self, index: int, size: int, desc: int, driver: int, device: int
    ) -> None:
        """Begin to use a queue that lies in its shared memory.

        Raises InvalidError, NotFoundError, BusyError.
        """
        queue = self._model.queue(index)
        if Status.FEATURES_OK not in self._model.status:
            raise InvalidError("a queue is enabled after FEATURES_OK")
        if index not in self._shared:
            raise InvalidError(f"queue {index} has no memory yet")
        view = self._shared[index].view
        packed = self._model.has(Ring.PACKED)
        areas = (
            (desc, 16 * size, 16),
            (driver, _EVENT_AREA if packed else _SPLIT_DRIVER + 2 * size, 2),
            (device, _EVENT_AREA if packed else _SPLIT_DEVICE + 8 * size, 4),
        )
        for at, length, alignment in areas:
            if at + length > view.size or (view.addr + at) % alignment:
                raise InvalidError(f"queue {index}: {length} bytes do not lie at {at}")
        queue.set_up(
            size=size,
            desc=view.addr + desc,
            driver=view.addr + driver,
            device=view.addr + device,
            packed=packed,
        )
        self._model.enable_queue(index)

    def reset_queue(self, index: int) -> None:
        """Reset one queue. Raises InvalidError, NotFoundError."""
        if not self._model.has(Ring.RESET):
            raise InvalidError("RING_RESET was not negotiated")
        self._model.reset_queue(index)

    def counters(self) -> tuple[int, int, int]:
        """Kicks; signals; those that crossed."""
        found = [shm.signal.statistics() for shm in self._shared.values() if shm.signal]
        return (
            self.kicks,
            sum(each.injects for each in found),
            sum(each.notifications for each in found),
        )


class VirtioOnBus(Device):
    """A device of type "virtio": subclasses make `model` in `setup`."""

    type = abi.TYPE
    version = abi.VERSION

    model: VirtioDevice
    _session: Session | None = None
    _serving = False
    _before = (0, 0, 0)

    # The device's life

    async def serve(self) -> None:
        self._serving = True
        try:
            await self.model.run()
        finally:
            self.released()

    def teardown(self) -> None:
        self.model.reset()
        if not self._serving:
            self.released()

    def released(self) -> None:
        """The model has ended: close what it used."""

    def pci_function(self, layout: str, *, spin_us: float = 0) -> PciFunction:
        return function(self.model, layout, spin_us=spin_us)

    # The connection

    def open(self, connection: Connection) -> None:
        session = Session(connection, self.model)
        try:
            self.model.attach(session)
        except InvalidError:
            raise BusyError(f"{self.name} is a PCI function") from None
        self._session = session

    def close(self, connection: Connection) -> None:
        self._before = self._counters()
        self._session = None
        self.model.detach()

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        self._now.share(shm)

    async def run(self, connection: Connection) -> None:
        if self._session is not None:
            await self._session.run()

    @property
    def _now(self) -> Session:
        assert self._session is not None
        return self._session

    # Functions

    @call(abi.Func.GETID)
    def getid(self, connection: Connection, data: bytes) -> int:
        _check(data, 0)
        return self.model.device_id

    @call(abi.Func.GETINFO)
    def getinfo(self, connection: Connection, data: bytes) -> bytes:
        _check(data, abi.INFO.size)
        model = self.model
        return abi.INFO.pack(
            model.device_id, VENDOR, len(model.queues), model.config.size
        )

    @call(abi.Func.GETFEATURES)
    def getfeatures(self, connection: Connection, data: bytes) -> bytes:
        _check(data, abi.FEATURES.size)
        select, _ = abi.FEATURES.unpack(data)
        offered = self.model.offered
        word = offered >> 32 * select & _WORD if select < abi.FEATURE_WORDS else 0
        return abi.FEATURES.pack(select, word)

    @call(abi.Func.SETFEATURES)
    def setfeatures(self, connection: Connection, data: bytes) -> None:
        _check(data, abi.FEATURES.size)
        self._now.set_features(*abi.FEATURES.unpack(data))

    @call(abi.Func.GETSTATUS)
    def getstatus(self, connection: Connection, data: bytes) -> int:
        _check(data, 0)
        return int(self.model.status)

    @call(abi.Func.SETSTATUS)
    def setstatus(self, connection: Connection, data: bytes) -> int:
        _check(data, abi.STATUS.size)
        return self._now.set_status(*abi.STATUS.unpack(data))

    @call(abi.Func.GETCONFIG)
    def getconfig(self, connection: Connection, data: bytes) -> bytes:
        offset, wanted = self._config_range(data)
        config = self.model.config
        head = abi.CONFIG_HEAD.pack(offset, config.generation & _WORD)
        return head + self.model.read_config(offset, len(wanted))

    @call(abi.Func.SETCONFIG)
    def setconfig(self, connection: Connection, data: bytes) -> None:
        offset, wanted = self._config_range(data)
        self.model.write_config(offset, wanted)
        self.model.commit_config()

    def _config_range(self, data: bytes) -> tuple[int, bytes]:
        if len(data) <= abi.CONFIG_HEAD.size:
            raise InvalidError("the configuration is read and written by bytes")
        offset, _ = abi.CONFIG_HEAD.unpack_from(data)
        wanted = data[abi.CONFIG_HEAD.size :]
        if offset + len(wanted) > self.model.config.size:
            raise InvalidError(
                f"{len(wanted)} bytes at {offset} are not inside the configuration"
                f" of {self.model.config.size}"
            )
        return offset, wanted

    @call(abi.Func.GETQUEUE)
    def getqueue(self, connection: Connection, data: bytes) -> bytes:
        _check(data, abi.QUEUE.size)
        index, *_ = abi.QUEUE.unpack(data)
        queue = self.model.queue(index)
        state = abi.QUEUE_ENABLED if queue.enabled else 0
        return abi.QUEUE.pack(index, queue.max_size, queue.setup.size, state)

    @call(abi.Func.ENABLEQUEUE)
    def enablequeue(self, connection: Connection, data: bytes) -> None:
        _check(data, abi.ENABLE.size)
        index, size, desc, driver, device, _ = abi.ENABLE.unpack(data)
        self._now.enable_queue(index, size, desc, driver, device)

    @call(abi.Func.RESETQUEUE)
    def resetqueue(self, connection: Connection, data: bytes) -> None:
        _check(data, abi.INDEX.size)
        self._now.reset_queue(*abi.INDEX.unpack(data))

    # Counters

    def _counters(self) -> tuple[int, int, int]:
        now = self._session.counters() if self._session is not None else (0, 0, 0)
        kicks, signals, crossed = (
            a + b for a, b in zip(self._before, now, strict=True)
        )
        return kicks, signals, crossed

    def adapter_statistics(self) -> AdapterStatistics:
        """A snapshot of what crossed the bus, over all connections."""
        return AdapterStatistics(*self._counters())


def _check(data: bytes, size: int) -> None:
    if len(data) != size:
        raise InvalidError(f"{len(data)} bytes where {size} are due")


__all__ = ["AdapterStatistics", "Session", "VirtioOnBus"]
