"""The conformance kit: good devices pass, each kind of bad one is found out."""

from array import array
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from vbus import Connection, Device, SharedMemory, attribute, call
from vbus.abi import EventId
from vbus.bus import BusModel
from vbus.errors import InvalidError, RingFault
from vbus.testing import NurseryEffects, RecordedBridge, check_device


class Echo(Device):
    """Returns the data of calls; what comes on ring 0 goes out on ring 1."""

    type = "org.vbus.echo"

    @call(0)
    def echo(self, connection: Connection, data: bytes) -> bytes:
        return data

    @call(1)
    async def upper(self, connection: Connection, data: bytes) -> bytes:
        return data.upper()

    async def run(self, connection: Connection) -> None:
        requests = await connection.consumer(0)
        replies = await connection.producer(1)
        payload, sizes = bytearray(1 << 16), array("I", bytes(4 * 32))
        while True:
            count = await requests.receive(payload, sizes)
            taken = sizes[:count]
            await replies.send(memoryview(payload)[: sum(taken)], taken)


async def test_an_echo_device_conforms() -> None:
    await check_device(Echo)


async def test_an_empty_device_conforms() -> None:
    await check_device(type("Nothing", (Device,), {"type": "org.vbus.nothing"}))


class Lower(Device):
    """What another device needs."""


class Upper(Echo):
    lower = attribute(str)

    def setup(self) -> None:
        self.host.device(self.lower)


async def test_a_device_that_needs_another_is_made_by_a_function() -> None:
    def make(model: BusModel) -> Device:
        model.classes.update(lower=Lower, upper=Upper)
        model.add_device("lower0", "lower")
        return model.add_device("upper0", "upper", {"lower": "lower0"})

    await check_device(make)


async def test_bytes_go_through_an_echo_device() -> None:
    """R4, R5, R12: both ends of both rings in this process."""
    async with trio.open_nursery() as nursery:
        effects = NurseryEffects(nursery)
        with RecordedBridge({"echo": Echo}, effects=effects) as recorded:
            recorded.add("echo0", "echo")
            peer = recorded.peer
            await peer.start()
            handle = await peer.open(0)
            assert await peer.call(handle, 1, b"abc") == (0, b"ABC")
            request = await peer.share_ring(handle, 0, 8)
            reply = await peer.share_ring(handle, 1, 8)
            slots = [(peer.allocate(256), 256) for _ in range(8)]
            posted = [(at, *slot) for at, slot in enumerate(slots)]
            reply.ring.push(posted, index=0)
            out = peer.allocate(8 * 256)
            await trio.testing.wait_all_tasks_blocked()
            message = b"hello" + b"world!"
            sizes = array("I", [5, 6])
            assert request.ring.produce(message, sizes, (out, 256)) == 2
            request.ring.signal.inject()
            await trio.testing.wait_all_tasks_blocked()
            events = [event.handle for event in peer.take_events()]
            assert events == [0, request.cookie, reply.cookie]
            back, lengths = bytearray(64), array("I", bytes(32))
            assert reply.ring.consume(back, lengths, 8) == 2
            assert (bytes(back[:11]), lengths[:2]) == (message, sizes)
            await peer.close_device(handle)
            await trio.testing.wait_all_tasks_blocked()
            assert [event.eventid for event in peer.take_events()] == [
                EventId.SHMCLOSE,
                EventId.SHMCLOSE,
            ]
        nursery.cancel_scope.cancel()
    assert not effects.failures


@pytest.mark.parametrize("how", ["close", "unlink", "detach"])
async def test_a_normal_end_is_no_failure(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that waits for memory is cancelled, it does not see the end."""
    async with trio.open_nursery() as nursery:
        effects = NurseryEffects(nursery)
        with RecordedBridge({"echo": Echo}, effects=effects) as recorded:
            effects.failed = recorded.bridge.connection_failed
            recorded.add("echo0", "echo")
            await recorded.peer.start()
            handle = await recorded.peer.open(0)
            await trio.testing.wait_all_tasks_blocked()
            if how == "close":
                await recorded.peer.close_device(handle)
            elif how == "unlink":
                recorded.model.unlink("test", "echo0")
            else:
                recorded.peer.detach()
            await trio.testing.wait_all_tasks_blocked()
            assert recorded.bridge.statistics().connection_failures == 0
        nursery.cancel_scope.cancel()
    assert not effects.failures
    assert not caplog.records


# Bad devices


class CrashesOnCall(Echo):
    @call(3)
    def crash(self, connection: Connection, data: bytes) -> bytes:
        return bytes([data[5]])


class CrashesInRun(Echo):
    async def run(self, connection: Connection) -> None:
        shm = await connection.shared(0)
        text = shm.view.read(0, min(shm.size, 16))
        text.decode("ascii")


class CrashesOnClose(Echo):
    def close(self, connection: Connection) -> None:
        raise KeyError("never opened")


class OpensOnce(Echo):
    used = False

    def open(self, connection: Connection) -> None:
        if self.used:
            raise ZeroDivisionError
        self.used = True


class Untyped(Echo):
    type = ""


class BadStatistics(Echo):
    def statistics(self) -> object:
        return {"socket": object()}


@dataclass(frozen=True)
class Level:
    value: int


class BadAttribute(Echo):
    level = attribute(lambda value: Level(int(value)), default=Level(1))


class Slow(Echo):
    async def call(
        self, connection: Connection, func: int, data: bytes, flags: int
    ) -> bytes:
        await trio.sleep_forever()
        return b""


BAD: list[tuple[type[Device], type[Exception], str]] = [
    (CrashesOnCall, AssertionError, "call 3 of .* failed"),
    (CrashesInRun, AssertionError, "ended with a bug"),
    (CrashesOnClose, AssertionError, "its close failed"),
    (OpensOnce, OSError, "Input/output error"),
    (Untyped, InvalidError, "no interface"),
    (BadStatistics, TypeError, "Encoding"),
    (BadAttribute, InvalidError, "level"),
]


@pytest.mark.parametrize(("device", "error", "match"), BAD)
async def test_a_bad_device_is_found_out(
    device: type[Device], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        await check_device(device)


async def test_a_device_that_hangs_is_found_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(trio.TooSlowError):
        await check_device(Slow)


async def test_a_hostile_ring_is_no_fault_of_the_device() -> None:
    """RingFault ends the connection, as it should; the kit lets it pass."""

    class Watches(Echo):
        def share(self, connection: Connection, shm: SharedMemory) -> None:
            shm.ring()

        async def run(self, connection: Connection) -> None:
            await connection.shared(0)
            raise RingFault("as if")

    await check_device(Watches)
