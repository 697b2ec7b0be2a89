"""How the guest calls the host: the register window, and fast-call channels over it.

The window (BAR0) is one for the function, so bridge calls take turns. Hypercalls go
through channels, each of which carries one call at a time; calls on different channels
run at the same time and share no lock (ABI 2.4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import trio

from proxy.errors import refusal
from proxy.memory import PAGE_SIZE, DmaBuffer, DmaMemory
from proxy.pci import Abort, AbortedError, PciFunction
from vbus import abi
from vbus.abi import BAR_CALLS, BAR_SIGNALS, BridgeCall
from vbus.errors import BusyError, ProtocolError, VbusError

FIRST_CHANNELS = 4
CHANNEL_LIMIT = 64
_ARGUMENT_AT = 64
_DATA_AT = 256
_NOT_DONE = -(1 << 31)
"""Stands in a channel's result while its call runs; no errno."""


@dataclass(frozen=True)
class CallStatistics:
    """Calls by way; channels there are, and those with a cancelled call under way."""

    bridge_calls: int
    fast_calls: int
    slow_calls: int
    channels: int
    abandoned: int


class Answer(NamedTuple):
    """Result of a hypercall, and its argument and data as they are afterwards."""

    result: int
    argument: bytes
    data: bytes


class Slot:
    """What one call uses: a channel and its page, or without a channel only the page.

    call descriptor and result @0, argument @64, data @256 or, if larger, elsewhere.
    """

    def __init__(self, memory: DmaMemory, channel: int | None) -> None:
        self.channel = channel
        self._memory = memory
        self._page = memory.allocate(PAGE_SIZE, alignment=PAGE_SIZE)
        self._large: DmaBuffer | None = None
        self._view, self._at = self._page.view, _DATA_AT
        self.finish()

    @property
    def descriptor(self) -> int:
        """Address of the (fast-)call descriptor."""
        return self._page.addr

    def place(self, data: bytes, room: int) -> int:
        """Put the data of a call into memory with `room` bytes; give its address."""
        if _DATA_AT + room > PAGE_SIZE:
            self._large = self._memory.allocate(room)
            self._view, self._at = self._large.view, 0
            address = self._large.addr
        else:
            address = self._page.addr + _DATA_AT
        self._view.write(self._at, data)
        if room > len(data):
            self._view.write(self._at + len(data), bytes(room - len(data)))
        return address

    def data(self, size: int) -> bytes:
        """Read back the first `size` bytes of what `place` put there."""
        return self._view.read(self._at, size)

    def prepare(self, vector: int, argument: bytes) -> None:
        """Write the call into memory."""
        address = self._page.addr + _ARGUMENT_AT
        call = abi.FastCall(vector, len(argument), address, _NOT_DONE)
        self._page.view.write(_ARGUMENT_AT, argument)
        self._page.view.write(0, abi.FASTCALL.pack(call))

    def argument(self, size: int) -> bytes:
        """Read back the argument."""
        return self._page.view.read(_ARGUMENT_AT, size)

    @property
    def result(self) -> int | None:
        """What the host stored, None while it has not."""
        data = self._page.view.read(abi.RESULT_OFFSET, abi.RESULT.size)
        (result,) = abi.RESULT.unpack(data)
        return None if result == _NOT_DONE else int(result)

    def finish(self) -> None:
        """Note that no call is under way, where the host does not."""
        self._page.view.write(abi.RESULT_OFFSET, bytes(abi.RESULT.size))

    def clean(self) -> None:
        """Let go of large data."""
        self._view, self._at = self._page.view, _DATA_AT
        if self._large is not None:
            self._large.close()
            self._large = None

    def close(self) -> None:
        self.clean()
        self._page.close()


class Calls:
    """Bridge calls and hypercalls of one function."""

    def __init__(self, function: PciFunction) -> None:
        self._function = function
        self._window = trio.Lock()
        self._slots: list[Slot] = []
        self._free: list[Slot] = []
        self._abandoned: list[Slot] = []
        self._freed = trio.lowlevel.ParkingLot()
        self._next_channel = 0
        self._bridge_calls = self._fast_calls = self._slow_calls = 0

    # Bridge calls

    async def bridge_call(self, number: int, argument: bytes) -> tuple[int, bytes]:
        """Make a bridge call; give its result and the argument as it is afterwards.

        Waits for its turn; then it cannot be cancelled: the host answers within its
        own deadline.
        """
        memory = self._function.memory.allocate(len(argument))
        try:
            memory.view.write(0, argument)
            result = await self._execute(number, len(argument), memory.addr)
            return result, memory.view.read()
        finally:
            memory.close()

    async def _execute(self, number: int, length: int, address: int) -> int:
        """Write the call into the window as four words and read its result."""
        words = abi.CALL.pack(abi.CallDescriptor(number, length, address))
        async with self._window:
            self._bridge_calls += 1
            for at in range(0, len(words), 4):
                self._function.post_write(BAR_CALLS, at, words[at : at + 4])
            with trio.CancelScope(shield=True):
                answer = await self._function.bar_read(BAR_CALLS, 0, abi.RESULT.size)
        return int(abi.RESULT.unpack(answer)[0])

    # Channels

    async def add_channels(self, count: int = FIRST_CHANNELS) -> None:
        """Have some channels ready before the first call."""
        for _ in range(count):
            self._free.append(await self._new_slot())

    async def hypercall(
        self,
        vector: int,
        build: Callable[[int], bytes],
        data: bytes = b"",
        room: int = 0,
        abort: Abort | None = None,
    ) -> Answer:
        """Make a hypercall; `build` makes its argument from the address of its data.

        `data` has `room` bytes in all. Cancelled or aborted, the call goes on in the
        host. Raises NoDeviceError, ProtocolError, NoSpaceError, and BusyError if
        cancelled calls hold every channel.
        """
        slot = self._free.pop() if self._free else await self._acquire()
        try:
            argument = build(slot.place(data, room) if room else 0)
            result = await self._run(slot, vector, argument, abort)
            return Answer(result, slot.argument(len(argument)), slot.data(room))
        finally:
            if slot.result is None:
                self._abandoned.append(slot)
            else:
                slot.clean()
                self._free.append(slot)
                self._freed.unpark()

    async def _run(
        self, slot: Slot, vector: int, argument: bytes, abort: Abort | None
    ) -> int:
        if slot.channel is None:
            return await self._slow_call(slot, vector, argument)
        slot.prepare(vector, argument)
        self._fast_calls += 1
        number = slot.channel.to_bytes(4, "little")
        try:
            await self._function.bar_write(
                BAR_SIGNALS, abi.SIGNAL_FASTCALL, number, abort
            )
        except AbortedError as aborted:
            raise aborted.reason from None
        except VbusError:
            slot.finish()
            raise
        result = slot.result
        if result is None:
            raise ProtocolError(f"the host did not run the call on {slot.channel}")
        return result

    async def _slow_call(self, slot: Slot, vector: int, argument: bytes) -> int:
        """Go through the window; under way, the call cannot be cancelled."""
        self._slow_calls += 1
        slot.prepare(vector, argument)
        slot.finish()
        return await self._execute(BridgeCall.SLOWCALL, abi.CALL.size, slot.descriptor)

    async def _acquire(self) -> Slot:
        while not self._free:
            self._reclaim()
            if self._free:
                break
            if len(self._slots) < CHANNEL_LIMIT:
                return await self._new_slot()
            if len(self._abandoned) == len(self._slots):
                raise BusyError(
                    f"all {CHANNEL_LIMIT} channels wait for calls that were cancelled"
                )
            await self._freed.park()
        return self._free.pop()

    def _reclaim(self) -> None:
        """Take back the channels whose cancelled call has ended at last."""
        for slot in [slot for slot in self._abandoned if slot.result is not None]:
            self._abandoned.remove(slot)
            slot.clean()
            self._free.append(slot)

    async def _new_slot(self) -> Slot:
        """Make a slot with a channel of its own, if the host gives one."""
        channel = self._next_channel
        self._next_channel += 1
        slot = Slot(self._function.memory, channel)
        self._slots.append(slot)
        try:
            call = abi.CallDescriptor(channel, abi.FASTCALL.size, slot.descriptor)
            result, _ = await self.bridge_call(
                BridgeCall.FASTCALL_ADD, abi.CALL.pack(call)
            )
        except BaseException:
            self._slots.remove(slot)
            slot.close()
            raise
        if result < 0:
            slot.channel = None
        return slot

    def close(self) -> None:
        """Free the memory; the host must have let go of it."""
        for slot in self._slots:
            slot.close()

    def statistics(self) -> CallStatistics:
        """A snapshot of the counters."""
        return CallStatistics(
            self._bridge_calls,
            self._fast_calls,
            self._slow_calls,
            sum(slot.channel is not None for slot in self._slots),
            len(self._abandoned),
        )


def check(result: int, what: str) -> int:
    """Give back a result that is no error; raise the errno's VbusError otherwise."""
    if result < 0:
        raise refusal(-result, what)
    return result
