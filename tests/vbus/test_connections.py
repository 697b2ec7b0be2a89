"""A connection's life with async hooks: every racy state has a test here."""

from collections.abc import AsyncIterator, Awaitable
from errno import EBUSY, EEXIST, EINVAL, ENOENT, ETIMEDOUT

import pytest
import trio
import trio.testing

from tests.conftest import open_fds
from vbus import Connection, Device, SharedMemory, abi, call
from vbus.abi import EventId
from vbus.connection import Ended, State
from vbus.errors import InvalidError, NotFoundError, VbusError
from vbus.pci.function import Pending
from vbus.pci.pending import settle
from vbus.testing import NurseryEffects, RecordedBridge


class Slow(Device):
    """Every hook waits until the test lets it go, or lets it fail."""

    type = "org.vbus.slow"
    max_connections = 2

    def setup(self) -> None:
        self.gate = trio.Event()
        self.error: Exception | None = None
        self.log: list[str] = []

    async def _wait(self, what: str) -> None:
        self.log.append(what)
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.log.append(f"{what} cancelled")
            raise
        if self.error is not None:
            raise self.error

    async def open(self, connection: Connection) -> None:
        await self._wait("open")

    async def close(self, connection: Connection) -> None:
        await self._wait("close")

    async def share(self, connection: Connection, shm: SharedMemory) -> None:
        await self._wait("share")

    @call(0)
    async def wait(self, connection: Connection, data: bytes) -> bytes:
        await self._wait("call")
        return data.upper()

    @call(1)
    def at_once(self, connection: Connection, data: bytes) -> bytes:
        return data

    async def run(self, connection: Connection) -> None:
        await trio.sleep_forever()


class Stage:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.effects = NurseryEffects(nursery)
        self.recorded = RecordedBridge(
            {"slow": Slow}, effects=self.effects, call_timeout_s=7
        )
        self.bridge = self.recorded.bridge
        self.effects.failed = self.bridge.connection_failed
        self.peer = self.recorded.peer
        self.recorded.add("slow0", "slow")
        device = self.recorded.model.device("slow0")
        assert isinstance(device, Slow)
        self.device = device

    def pass_on(self) -> None:
        """Let every hook end at once from here on."""
        self.device.gate.set()

    def hold(self) -> None:
        """Let every hook wait again."""
        self.device.gate = trio.Event()

    def start_soon(self, operation: Awaitable[object], outcomes: list[object]) -> None:
        async def collect() -> None:
            try:
                outcomes.append(await operation)
            except OSError as error:
                outcomes.append(error.errno)

        self.nursery.start_soon(collect)

    async def rest(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        self.recorded.check()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with trio.open_nursery() as nursery:
        stage = Stage(nursery)
        await stage.peer.start()
        for channel in (1, 2, 3):
            assert await stage.peer.add_channel(channel) == 0
        stage.peer.take_events()
        yield stage
        stage.pass_on()
        await stage.rest()
        stage.recorded.close()
        await trio.testing.wait_all_tasks_blocked()
        assert not stage.effects.running
        assert not stage.device.connections
        nursery.cancel_scope.cancel()


async def open_now(stage: Stage) -> int:
    stage.pass_on()
    handle = await stage.peer.open(0)
    stage.hold()
    stage.device.log.clear()
    return handle


async def test_a_slow_call_holds_up_no_other_channel(stage: Stage) -> None:
    """R9: per-channel calls take no common lock."""
    handle = await open_now(stage)
    slow: list[object] = []
    stage.start_soon(stage.peer.call(handle, 0, b"slow", channel=1), slow)
    await stage.rest()
    assert await stage.peer.call(handle, 1, b"fast", channel=2) == (0, b"fast")
    assert slow == []
    stage.pass_on()
    await stage.rest()
    assert slow == [(0, b"SLOW")]


async def test_a_busy_channel_refuses_a_second_call(stage: Stage) -> None:
    """The guest broke its own lock: -EBUSY at once, the first call goes on."""
    handle = await open_now(stage)
    first: list[object] = []
    stage.start_soon(stage.peer.call(handle, 0, b"one", channel=1), first)
    await stage.rest()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await stage.peer.call(handle, 1, b"two", channel=1)
    assert caught.value.errno == EBUSY
    stage.pass_on()
    await stage.rest()
    assert first == [(0, b"ONE")]
    assert stage.bridge.statistics().refused_fast_calls == 1


async def test_a_call_has_a_deadline(
    stage: Stage, autojump_clock: trio.testing.MockClock
) -> None:
    handle = await open_now(stage)
    began = trio.current_time()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await stage.peer.call(handle, 0, b"never")
    assert caught.value.errno == ETIMEDOUT
    assert trio.current_time() - began == pytest.approx(7)
    assert stage.device.log == ["call", "call cancelled"]
    assert await stage.peer.call(handle, 1, b"on") == (0, b"on")


async def test_slow_slowcall(stage: Stage) -> None:
    """A Pending read of BAR0 gives the result in the end."""
    stage.pass_on()
    argument = abi.DEVOPEN.pack(abi.DeviceOpen(0, 1, 0))
    result, after = await stage.peer.hypercall(0, argument, channel=None)
    assert result == 0
    assert abi.DEVOPEN.unpack(after).handle == stage.bridge.connections[0].handle


# Opening


async def test_while_opening_there_is_no_handle(stage: Stage) -> None:
    opened: list[object] = []
    stage.start_soon(stage.peer.open(0, channel=1), opened)
    await stage.rest()
    (connection,) = stage.device.connections
    assert connection.state is State.OPENING
    assert stage.bridge.connections == []
    stage.pass_on()
    await stage.rest()
    assert opened == [connection.handle]
    assert connection.state is State.OPEN


async def test_a_device_that_opens_counts_as_open(stage: Stage) -> None:
    results: list[object] = []
    for channel in (1, 2, 3):
        stage.start_soon(stage.peer.open(0, channel=channel), results)
        await stage.rest()
    assert results == [EBUSY]
    stage.pass_on()


@pytest.mark.parametrize("how", ["unlink", "negotiate", "reset"])
async def test_the_guest_or_the_link_goes_while_opening(stage: Stage, how: str) -> None:
    """ABORTED: the device is told to close as soon as it has opened."""
    opened: list[object] = []
    stage.start_soon(stage.peer.open(0, channel=1), opened)
    await stage.rest()
    (connection,) = stage.device.connections
    if how == "unlink":
        stage.recorded.model.unlink("test", "slow0")
    elif how == "negotiate":
        await stage.peer.negotiate()
    else:
        stage.bridge.reset()
    assert connection.state is State.ABORTED
    await stage.rest()
    stage.pass_on()
    await trio.testing.wait_all_tasks_blocked()
    assert stage.device.log == ["open", "close"]
    assert connection.state is State.CLOSED
    assert stage.effects.opened == []
    if how == "unlink":
        assert opened == [ENOENT]


async def test_an_open_that_is_cancelled_is_forgotten(stage: Stage) -> None:
    """The client goes: the server cancels its pending accesses."""
    answer = _pending_open(stage)
    with trio.CancelScope() as scope:
        stage.nursery.start_soon(_cancel_when_blocked, scope)
        await settle(answer)
    assert stage.device.log == ["open", "open cancelled"]
    assert not stage.device.connections
    stage.peer.detach()


async def test_a_connections_area_goes_when_it_is_closed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "area_size", 1)
    stage.pass_on()
    handle = await stage.peer.open(0)
    (connection,) = stage.device.connections
    assert connection.area is not None
    assert len(areas()) == 1
    await stage.peer.close_device(handle)
    assert areas() == []


async def test_a_refused_open_leaves_no_area(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R51: a guest that opens again and again takes no descriptors."""
    monkeypatch.setattr(Slow, "area_size", 1)
    stage.pass_on()
    stage.device.error = InvalidError("no")
    with pytest.raises(OSError, match=str(EINVAL)):
        await stage.peer.open(0)
    assert areas() == []
    stage.device.error = None


def areas() -> list[str]:
    """What this process has open of connections' areas."""
    return [each for each in open_fds().values() if "vbus-area" in each]


async def test_open_completes_just_when_the_client_goes(stage: Stage) -> None:
    """The work is done but `complete` is never called: the device still closes."""
    stage.pass_on()
    await _pending_open(stage).work()
    (connection,) = stage.bridge.connections
    stage.peer.detach()
    await trio.testing.wait_all_tasks_blocked()
    assert connection.state is State.CLOSED
    assert stage.effects.closed == [(connection, Ended.RESET)]


def _pending_open(stage: Stage) -> Pending:
    peer = stage.peer
    gpa = peer.allocate(64)
    peer.memory.write(gpa, abi.DEVOPEN.pack(abi.DeviceOpen(0, 1, 0)))
    descriptor = abi.FastCall(0, abi.DEVOPEN.size, gpa, 0)
    peer.memory.write(peer._channels[1], abi.FASTCALL.pack(descriptor))
    answer = peer.signal(abi.SIGNAL_FASTCALL, 1)
    assert isinstance(answer, Pending)
    return answer


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


# Sharing


async def test_an_id_is_taken_while_the_device_decides(stage: Stage) -> None:
    handle = await open_now(stage)
    stage.nursery.start_soon(_share, stage, handle, 1)
    await stage.rest()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await stage.peer.share(handle, 4, 64, signal_offset=0, channel=2)
    assert caught.value.errno == EEXIST
    stage.pass_on()


async def _share(
    stage: Stage, handle: int, channel: int, results: list[object] | None = None
) -> None:
    try:
        await stage.peer.share(handle, 4, 64, signal_offset=0, channel=channel)
    except OSError as error:
        assert results is not None
        results.append(error.errno)


async def test_a_close_while_sharing_releases_and_sends_no_event(
    stage: Stage,
) -> None:
    handle = await open_now(stage)
    results: list[object] = []
    stage.nursery.start_soon(_share, stage, handle, 1, results)
    await stage.rest()
    (connection,) = stage.device.connections
    memory = connection.sharing[4]
    stage.recorded.model.unlink("test", "slow0")
    assert not memory.view.alive
    assert memory.woken().closed
    await stage.rest()
    stage.pass_on()
    await stage.rest()
    assert results == [ENOENT]
    assert [event.eventid for event in stage.peer.take_events()] == [EventId.DEVDROP]


async def test_a_refused_share_is_released(stage: Stage) -> None:
    handle = await open_now(stage)
    stage.device.error = InvalidError("no")
    stage.pass_on()
    with pytest.raises(OSError, match="Invalid"):
        await stage.peer.share(handle, 4, 64, signal_offset=0)
    stage.device.error = None
    assert (await stage.peer.share(handle, 4, 64, signal_offset=0)).handle == 0


async def test_shared_waits_for_the_guest(stage: Stage) -> None:
    """R5: what a device's run() does first."""
    handle = await open_now(stage)
    (connection,) = stage.device.connections
    got: list[object] = []

    async def wait() -> None:
        got.append(await connection.shared(4))

    stage.nursery.start_soon(wait)
    await stage.rest()
    stage.pass_on()
    await stage.peer.share(handle, 4, 64, signal_offset=0)
    await stage.rest()
    assert got == [connection.shm[4]]
    assert await connection.shared(4) is connection.shm[4]


async def test_shared_ends_with_the_connection(stage: Stage) -> None:
    handle = await open_now(stage)
    (connection,) = stage.device.connections
    ended = trio.Event()

    async def wait() -> None:
        with pytest.raises(NotFoundError):
            await connection.shared(4)
        ended.set()

    stage.nursery.start_soon(wait)
    await stage.rest()
    stage.pass_on()
    await stage.peer.close_device(handle)
    await ended.wait()


# Closing


async def test_a_slow_close_keeps_the_memory_and_the_place(stage: Stage) -> None:
    """ABI 3.2: a close may block; the handle is dead at once."""
    stage.pass_on()
    handles = [await stage.peer.open(0) for _ in range(2)]
    shared = await stage.peer.share(handles[0], 4, 64, signal_offset=0)
    connection = stage.bridge.connections[0]
    stage.hold()
    results: list[object] = []
    stage.start_soon(stage.peer.close_device(handles[0], channel=1), results)
    await stage.rest()
    assert connection.state is State.CLOSING
    assert connection.shm[4].view.alive
    assert connection not in stage.effects.running
    with pytest.raises(OSError, match="No such"):
        await stage.peer.call(handles[0], 1)
    with pytest.raises(OSError, match="busy"):
        await stage.peer.open(0)
    assert not stage.peer.take_events()
    stage.pass_on()
    await stage.rest()
    assert results == [None]
    stage.peer.take_events()
    assert shared.closed
    assert await stage.peer.open(0)


@pytest.mark.parametrize("how", ["negotiate", "detach"])
async def test_a_reset_during_a_slow_close_takes_the_memory(
    stage: Stage, how: str
) -> None:
    handle = await open_now(stage)
    stage.pass_on()
    await stage.peer.share(handle, 4, 64, signal_offset=0)
    (connection,) = stage.device.connections
    memory = connection.shm[4]
    stage.hold()
    results: list[object] = []
    stage.start_soon(stage.peer.close_device(handle, channel=1), results)
    await stage.rest()
    if how == "negotiate":
        await stage.peer.negotiate()
    else:
        stage.peer.detach()
    assert not memory.view.alive
    assert memory.woken().closed
    await stage.rest()
    stage.pass_on()
    await trio.testing.wait_all_tasks_blocked()
    assert connection.state is State.CLOSED


async def test_a_slow_close_after_a_reset_has_a_deadline(
    stage: Stage,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await open_now(stage)
    (connection,) = stage.device.connections
    stage.peer.detach()
    assert connection.state is State.CLOSING
    with trio.move_on_after(8):
        await trio.sleep_forever()
    assert connection.state is State.CLOSED
    assert "close failed" in caplog.text
    assert stage.device.log == ["close", "close cancelled"]


async def test_a_call_in_flight_outlives_nothing(stage: Stage) -> None:
    """After a reset its result is not written: that memory may be other things now."""
    handle = await open_now(stage)
    results: list[object] = []
    stage.start_soon(stage.peer.call(handle, 0, b"late", channel=1), results)
    await stage.rest()
    await stage.peer.negotiate()
    before = stage.peer.memory.read(stage.peer.base, stage.peer.size)
    stage.pass_on()
    await trio.testing.wait_all_tasks_blocked()
    assert stage.peer.memory.read(stage.peer.base, stage.peer.size) == before


# Failing


class Picky(Slow):
    """Its run() fails in the way the test asks for."""

    failure: Exception = VbusError("hostile ring")

    async def open(self, connection: Connection) -> None:
        pass

    async def close(self, connection: Connection) -> None:
        pass

    async def share(self, connection: Connection, shm: SharedMemory) -> None:
        pass

    async def run(self, connection: Connection) -> None:
        await self.gate.wait()
        raise self.failure


@pytest.mark.parametrize("failure", [VbusError("hostile ring"), ZeroDivisionError("x")])
async def test_a_failing_task_ends_its_connection_alone(
    stage: Stage, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """SHMCLOSE for its signals, later calls -ENOENT, a log line and a counter."""
    stage.recorded.model.classes["picky"] = Picky
    devid = stage.recorded.add("picky0", "picky").id
    picky = stage.recorded.model.device("picky0")
    assert isinstance(picky, Picky)
    picky.failure = failure
    other = await open_now(stage)
    stage.peer.take_events()
    handle = await stage.peer.open(devid)
    shared = await stage.peer.share(handle, 1, 64, signal_offset=0)
    picky.gate.set()
    await stage.rest()
    assert [event.handle for event in stage.peer.take_events()] == [shared.cookie]
    assert shared.closed
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await stage.peer.call(handle, 1)
    assert caught.value.errno == ENOENT
    assert await stage.peer.call(other, 1, b"x") == (0, b"x")
    assert stage.bridge.statistics().connection_failures == 1
    assert str(failure) in caplog.text
    assert [reason for _, reason in stage.effects.closed] == [Ended.FAILED]


async def test_a_failure_after_the_end_changes_nothing(stage: Stage) -> None:
    handle = await open_now(stage)
    (connection,) = stage.bridge.connections
    stage.pass_on()
    await stage.peer.close_device(handle)
    stage.bridge.connection_failed(connection, VbusError("too late"))
    assert [reason for _, reason in stage.effects.closed] == [Ended.CLOSED]


async def test_unlink_closes_then_drops(stage: Stage) -> None:
    """SHMCLOSE per signal first, then DEVDROP (R8)."""
    handle = await open_now(stage)
    stage.pass_on()
    for id in range(2):
        await stage.peer.share(handle, id, 64, signal_offset=0)
    stage.recorded.model.unlink("test", "slow0")
    events = [event.eventid for event in stage.peer.take_events()]
    assert events == [EventId.SHMCLOSE, EventId.SHMCLOSE, EventId.DEVDROP]
    await stage.rest()
    assert stage.device.log[-1] == "close"
