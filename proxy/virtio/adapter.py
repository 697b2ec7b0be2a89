"""A virtio device behind the bridge: ABI section 9.3 from the guest's side."""

from proxy.device import DeviceProxy, SharedMemory, Wake
from proxy.memory import DmaBuffer
from proxy.virtio.ring import RingLayout
from proxy.virtio.transport import Identity
from shm import ShmSignal
from vbus.errors import InvalidError, ProtocolError
from vbus.virtio import adapter as abi
from vbus.virtio.adapter import Func

_PAGE = 4096
_SIGNAL_ROOM = 64
_WORDS = 2
"""Words of features that have a meaning to us."""


class _ShmQueueSignal:
    """The signal of a queue's memory: ours kicks, the device's tells of used chains."""

    def __init__(self, signal: ShmSignal, wake: Wake) -> None:
        self._signal = signal
        self._wake = wake

    def kick(self) -> None:
        self._signal.inject()

    def rearm(self) -> bool:
        if not self._signal.wakeup_end():
            return False
        self._signal.wakeup_begin()
        return True

    async def wait(self) -> None:
        await self._wake.wait()
        self._signal.wakeup_begin()


class BusTransport:
    """Reaches a device of type "virtio" that is open."""

    def __init__(self, device: DeviceProxy, prio: int = 0) -> None:
        """Take the device, and the priority of its queues' events (ABI 5)."""
        self.name = device.name
        self._prio = prio
        self.space = device.space
        self.config_changed = Wake()
        self._device = device
        self._config_signal: ShmSignal | None = None
        self._memory: dict[int, tuple[DmaBuffer, SharedMemory]] = {}

    async def identify(self) -> Identity:
        device_id, _ = await self._device.call(Func.GETID)
        _, answer = await self._device.call(Func.GETINFO, bytes(abi.INFO.size))
        info = abi.INFO.unpack(answer)
        if info[0] != device_id:
            raise ProtocolError(f"{self.name} is of kind {device_id} and of {info[0]}")
        return Identity(device_id, min(info[2], abi.MAX_QUEUES), info[3])

    async def watch_config(self) -> None:
        """Have `config_changed` rung, once per connection."""
        buffer = self._device.allocate(_SIGNAL_ROOM)
        ShmSignal.format(buffer.view, 0)
        shm = await self._device.shm(
            abi.CONFIG_SHM, buffer, signal_offset=0, wake=self.config_changed
        )
        assert shm.signal is not None
        self._config_signal = shm.signal
        if shm.signal.enable():
            self.config_changed.ring()

    def config_seen(self) -> None:
        """The change is about to be looked at: be told of the next one."""
        signal = self._config_signal
        if signal is not None:
            signal.wakeup_begin()
            if signal.wakeup_end():
                self.config_changed.ring()

    async def offered(self) -> int:
        word = 0
        for select in range(_WORDS):
            _, answer = await self._device.call(
                Func.GETFEATURES, abi.FEATURES.pack(select, 0)
            )
            word |= abi.FEATURES.unpack(answer)[1] << 32 * select
        return word

    async def accept(self, features: int) -> None:
        for select in range(_WORDS):
            word = features >> 32 * select & 0xFFFF_FFFF
            await self._device.call(Func.SETFEATURES, abi.FEATURES.pack(select, word))

    async def status(self) -> int:
        return (await self._device.call(Func.GETSTATUS))[0]

    async def set_status(self, value: int) -> int:
        return (await self._device.call(Func.SETSTATUS, abi.STATUS.pack(value)))[0]

    async def read_config(self, offset: int, size: int) -> bytes:
        head = abi.CONFIG_HEAD.pack(offset, 0)
        _, answer = await self._device.call(Func.GETCONFIG, head + bytes(size))
        return answer[abi.CONFIG_HEAD.size :]

    async def write_config(self, offset: int, data: bytes) -> None:
        head = abi.CONFIG_HEAD.pack(offset, 0)
        await self._device.call(Func.SETCONFIG, head + data)

    async def queue_limit(self, index: int) -> int:
        _, answer = await self._device.call(
            Func.GETQUEUE, abi.QUEUE.pack(index, 0, 0, 0)
        )
        limit: int = abi.QUEUE.unpack(answer)[1]
        return limit

    async def queue_memory(self, index: int, size: int) -> DmaBuffer:
        """Share memory for a ring, its signal behind it; the next time it is the same.

        Raises InvalidError if that is too small then.
        """
        if index not in self._memory:
            at = -(-size // _SIGNAL_ROOM) * _SIGNAL_ROOM
            buffer = self._device.allocate(at + _SIGNAL_ROOM, alignment=_PAGE)
            ShmSignal.format(buffer.view, at)
            shm = await self._device.shm(
                index, buffer, signal_offset=at, prio=self._prio
            )
            assert shm.signal is not None
            shm.signal.enable()
            self._memory[index] = buffer, shm
        buffer = self._memory[index][0]
        if size > buffer.size - _SIGNAL_ROOM:
            raise InvalidError(f"{self.name}: queue {index} has less memory than that")
        return buffer

    async def enable_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> _ShmQueueSignal:
        buffer, shm = self._memory[index]
        parts = (each - buffer.addr for each in layout)
        await self._device.call(
            Func.ENABLEQUEUE, abi.ENABLE.pack(index, entries, *parts, 0)
        )
        assert shm.signal is not None
        return _ShmQueueSignal(shm.signal, shm.wake)

    async def reset_queue(self, index: int) -> None:
        """Reset one queue; complete on return. Needs RING_RESET."""
        await self._device.call(Func.RESETQUEUE, abi.INDEX.pack(index))

    def allocate(self, size: int, *, alignment: int = 64) -> DmaBuffer:
        return self._device.allocate(size, alignment=alignment)
