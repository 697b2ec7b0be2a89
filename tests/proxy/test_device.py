"""Device proxies: calls, shared memory, rings, and how a connection ends."""

import errno
from array import array
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from proxy.bridge import BridgeDriver
from proxy.device import DeviceProxy, Wake
from proxy.guest import attach
from shm import ShmSignal
from tests.proxy.host import Host, until
from vbus.connection import Connection, SharedMemory
from vbus.device import Device, call
from vbus.errors import (
    BusyError,
    CallTimeoutError,
    InvalidError,
    NoDeviceError,
    NotFoundError,
    VbusError,
)


class Lab(Device):
    """A device whose calls do what the tests need."""

    type = "org.example.lab"
    version = 3

    def setup(self) -> None:
        self.gates: dict[int, trio.Event] = {}
        self.inside: list[int] = []
        self.seen: list[bytes] = []
        self.latest: SharedMemory | None = None

    @call(0)
    def reverse(self, connection: Connection, data: bytes) -> bytes:
        self.seen.append(data)
        return data[::-1]

    @call(1)
    def refuse(self, connection: Connection, data: bytes) -> int:
        return -int.from_bytes(data, "little")

    @call(2)
    async def block(self, connection: Connection, data: bytes) -> tuple[int, bytes]:
        number = data[0]
        self.inside.append(number)
        await self.gates.setdefault(number, trio.Event()).wait()
        return number, bytes([number + 100])

    @call(3)
    def flags(self, connection: Connection, data: bytes, flags: int) -> int:
        return flags

    @call(4)
    def signal(self, connection: Connection, data: bytes) -> None:
        shm = connection.shm[data[0]]
        assert shm.signal is not None
        shm.signal.inject()

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        if shm.id == 99:
            raise NotFoundError("no 99 here")
        self.latest = shm


Opened = tuple[Lab, BridgeDriver, DeviceProxy]


@pytest.fixture
async def lab(host: Host) -> AsyncIterator[Opened]:
    """A guest that has an open Lab: the host's device, the bridge, the proxy."""
    host.model.classes["lab"] = Lab
    device = host.add("lab0", "lab")
    assert isinstance(device, Lab)
    async with attach(await host.add_guest()) as bridge:
        proxy = await bridge.device("lab0")
        await proxy.open(3)
        yield device, bridge, proxy


async def test_data_goes_in_and_comes_out(lab: Opened) -> None:
    """R4: one buffer, both ways, of any size; more room than data is zeroed."""
    device, _, proxy = lab
    assert await proxy.call(0, b"abc") == (0, b"cba")
    assert await proxy.call(0, b"abc", 5) == (0, b"\0\0cba")
    assert await proxy.call(0, b"abcd", 2) == (0, b"dc")
    assert await proxy.call(0) == (0, b"")
    large = bytes(range(256)) * 400
    assert await proxy.call(0, large) == (0, large[::-1])
    assert device.seen[1] == b"abc\0\0"
    assert await proxy.call(3, flags=7) == (7, b"")
    assert proxy.statistics().calls == 6


async def test_a_result_below_zero_is_the_error_of_its_errno(lab: Opened) -> None:
    """R4: errno-style results."""
    _, bridge, proxy = lab
    for code, kind in (
        (errno.ENOENT, NotFoundError),
        (errno.EBUSY, BusyError),
        (errno.EINVAL, InvalidError),
        (errno.ENODATA, VbusError),
    ):
        with pytest.raises(kind, match=errno.errorcode[code]) as caught:
            await proxy.call(1, code.to_bytes(2, "little"))
        assert caught.value.errno == code
    with pytest.raises(InvalidError):
        await proxy.call(77)
    assert proxy.statistics().refused_calls == 5
    assert bridge.statistics().calls.abandoned == 0


async def test_a_call_needs_an_open_device_of_the_right_version(host: Host) -> None:
    """R3: nothing reaches the device without a handle."""
    host.model.classes["lab"] = Lab
    host.add("lab0", "lab")
    async with attach(await host.add_guest()) as bridge:
        proxy = await bridge.device("lab0")
        with pytest.raises(InvalidError, match="not open"):
            await proxy.call(0, b"abc")
        with pytest.raises(InvalidError):
            await proxy.open(2)
        await proxy.open(3)
        with pytest.raises(BusyError):
            await proxy.open(3)
        await proxy.close()
        await proxy.close()
        with pytest.raises(InvalidError, match="not open"):
            proxy.allocate(10)


async def test_calls_overlap_on_their_channels(lab: Opened) -> None:
    """R9: ten calls at once, answered in the opposite order; no call waits."""
    device, bridge, proxy = lab
    results: dict[int, tuple[int, bytes]] = {}

    async def one(number: int) -> None:
        results[number] = await proxy.call(2, bytes([number]))

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(one, number)
        await until(lambda: len(device.inside) == 10)
        assert await proxy.call(0, b"quick") == (0, b"kciuq")
        for number in reversed(range(10)):
            device.gates[number].set()
            await until(lambda number=number: number in results)
    assert results == {n: (n, bytes([n + 100])) for n in range(10)}
    calls = bridge.statistics().calls
    assert calls.slow_calls == 0
    assert calls.channels == 11


async def test_a_cancelled_call_leaves_its_channel_alone(lab: Opened) -> None:
    """R9: the host still writes there; the channel is used again after that only."""
    device, bridge, proxy = lab
    for number in range(3):
        with trio.move_on_after(0.02) as scope:
            await proxy.call(2, bytes([number]) * 5000)
        assert scope.cancelled_caught
    assert bridge.statistics().calls.abandoned == 3
    assert await proxy.call(0, b"abc") == (0, b"cba")
    for number in range(3):
        device.gates[number].set()
    host_side = bridge.calls
    await until(lambda: all(slot.result is not None for slot in host_side._abandoned))
    used = bridge.function.memory.statistics().used
    async with trio.open_nursery() as nursery:
        for number in range(3, 10):
            device.gates[number] = trio.Event()
            device.gates[number].set()
            nursery.start_soon(proxy.call, 2, bytes([number]))
    calls = bridge.statistics().calls
    assert calls.abandoned == 0
    assert calls.channels <= 8
    assert bridge.function.memory.statistics().used < used + 5 * 4096


async def test_calls_fall_back_to_the_register_window(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that gives no channels is called by SLOWCALL."""
    monkeypatch.setattr("vbus.bridge.CHANNEL_LIMIT", 0)
    host.add("echo0")
    async with attach(await host.add_guest()) as bridge:
        proxy = await bridge.device("echo0")
        async with proxy.opened():
            async with trio.open_nursery() as nursery:
                for size in (1, 100, 10_000):
                    nursery.start_soon(proxy.call, 0, bytes(size))
            assert await proxy.call(0, b"hello") == (0, b"hello")
        calls = bridge.statistics().calls
        assert (calls.fast_calls, calls.slow_calls) == (0, 6)
        assert (calls.channels, calls.abandoned) == (0, 0)


async def test_memory_is_shared_with_a_signal_each_way(lab: Opened) -> None:
    """R5: a signal path is made by DEVSHM, and used in both directions."""
    device, bridge, proxy = lab
    assert not bridge._signals
    buffer = proxy.allocate(4096)
    ShmSignal.format(buffer.view, 64)
    wake = Wake()
    shm = await proxy.shm(5, buffer, signal_offset=64, prio=3, wake=wake)
    assert device.latest is not None
    assert (device.latest.id, device.latest.prio) == (5, 3)
    assert device.latest.handle == shm.handle == 0
    buffer.view.write(0, b"from the guest")
    assert device.latest.view.read(0, 14) == b"from the guest"
    assert shm.signal is not None
    shm.signal.enable()
    with trio.fail_after(5):
        await proxy.call(4, bytes([5]))
        await wake.wait()
        assert device.latest.signal is not None
        device.latest.signal.enable()
        shm.signal.inject()
        assert device.latest.doorbell is not None
        await device.latest.doorbell.wait()


async def test_a_doorbell_becomes_an_eventfd(lab: Opened) -> None:
    """R9: once the host has offered its eventfd, ringing takes no message."""
    device, bridge, proxy = lab
    ring, shm = await proxy.ring(1, 16)
    await proxy.call(0)  # its reply comes after that with the eventfds
    assert device.latest is not None
    assert device.latest.doorbell is not None
    function = bridge.function
    messages = function.statistics().posted_writes
    for _ in range(5):
        assert device.latest.signal is not None
        device.latest.signal.enable()
        ring.signal.inject()
        device.latest.signal.wakeup_begin()
        device.latest.signal.wakeup_end()
        with trio.fail_after(5):
            await device.latest.doorbell.wait()
    assert function.statistics().posted_writes == messages
    assert function.statistics().doorbells_by_eventfd == 5
    assert shm.handle == 0


async def test_a_refused_share_leaves_nothing_behind(lab: Opened) -> None:
    """R5: no event can carry the cookie of a DEVSHM that failed."""
    _, bridge, proxy = lab
    with pytest.raises(NotFoundError, match="DEVSHM of 99"):
        await proxy.ring(99, 16)
    assert not bridge._signals
    await proxy.ring(1, 16)
    with pytest.raises(InvalidError, match="shared already"):
        await proxy.ring(1, 16)
    assert len(bridge._signals) == 1


async def test_messages_go_round_in_rings(host: Host) -> None:
    """R12, R61: north and south in one process, both with the same queue library."""
    host.add("echo0")
    async with attach(await host.add_guest()) as bridge:
        proxy = await bridge.device("echo0")
        async with proxy.opened():
            requests = await proxy.producer(0, 16, slot_size=256)
            replies = await proxy.consumer(1, 16, slot_size=256)
            messages = [bytes([n % 256]) * (n % 200 + 1) for n in range(1000)]
            received: list[bytes] = []

            async def send() -> None:
                for message in messages:
                    await requests.send(message, len(message))

            async def receive() -> None:
                payload, sizes = bytearray(16 * 256), array("I", [0]) * 16
                while len(received) < len(messages):
                    count = await replies.receive(payload, sizes)
                    at = 0
                    for size in sizes[:count]:
                        received.append(bytes(payload[at : at + size]))
                        at += size

            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send)
                    nursery.start_soon(receive)
            assert received == messages


async def test_a_lost_device_wakes_who_waits_for_it(host: Host) -> None:
    """R8: DEVDROP ends waiting for a ring, for a signal and for a call."""
    host.model.classes["lab"] = Lab
    host.add("lab0", "lab")
    ended: list[str] = []

    async def expect(work: object, *arguments: object) -> None:
        try:
            await work(*arguments)  # type: ignore[operator]
        except VbusError as error:
            ended.append(str(error))

    async with attach(await host.add_guest()) as bridge:
        used = bridge.function.memory.statistics().used
        proxy = await bridge.device("lab0")
        await proxy.open(3)
        consumer = await proxy.consumer(1, 4, slot_size=64)
        _, shm = await proxy.ring(2, 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect, consumer.wait)
            nursery.start_soon(expect, shm.wake.wait)
            nursery.start_soon(expect, proxy.call, 2, b"\1")
            await trio.testing.wait_all_tasks_blocked(0.01)
            host.drop("lab0")
        assert ended == ["lab0 has left the bus"] * 3
        with pytest.raises(NoDeviceError):
            await consumer.wait()
        await proxy.close()
        assert not bridge._signals
        assert bridge.function.memory.statistics().used == used


async def test_a_connection_the_host_ends_can_be_opened_again(
    host: Host, lab: Opened
) -> None:
    """SHMCLOSE without our DEVCLOSE: the connection is over, the device is not."""
    device, _, proxy = lab
    _, shm = await proxy.ring(1, 4)
    (connection,) = device.connections
    host.bridges["g1"].connection_failed(connection, RuntimeError("of a test"))
    with pytest.raises(NoDeviceError, match="closed lab0"):
        await shm.wake.wait()
    with pytest.raises(NoDeviceError):
        await proxy.call(0)
    await proxy.close()
    await proxy.open(3)
    assert await proxy.call(0, b"ab") == (0, b"ba")


async def test_a_call_the_device_never_answers_times_out(host: Host) -> None:
    """R4: the host's deadline is an errno like any other."""
    host.model.classes["lab"] = Lab
    host.add("lab0", "lab")
    async with attach(await host.add_guest(call_timeout_s=0.05)) as bridge:
        proxy = await bridge.device("lab0")
        async with proxy.opened(3):
            with pytest.raises(CallTimeoutError, match="ETIMEDOUT"):
                await proxy.call(2, b"\1")
            assert await proxy.call(0, b"ab") == (0, b"ba")
        assert bridge.statistics().calls.abandoned == 0


async def test_every_channel_busy_for_cancelled_calls_is_an_error(
    lab: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.calls.CHANNEL_LIMIT", 4)
    _, _, proxy = lab
    for number in range(4):
        with trio.move_on_after(0.02):
            await proxy.call(2, bytes([number]))
    with pytest.raises(BusyError, match="were cancelled"):
        await proxy.call(0, b"abc")
