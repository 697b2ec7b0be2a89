"""Events on their way to the guest: coalesced (R6), and the urgent ones first (R7)."""

from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from proxy.bridge import BridgeDriver
from proxy.device import DeviceProxy, Wake
from proxy.guest import attach
from shm import ShmSignal
from tests.proxy.host import Host, until
from vbus.abi import EventId
from vbus.connection import Connection, SharedMemory
from vbus.device import Device
from vbus.errors import ProtocolError
from vbus.events import Event


class Bell(Device):
    """A device that signals whatever memory it is told to."""

    type = "org.example.bell"

    def setup(self) -> None:
        self.memories: dict[int, SharedMemory] = {}

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        self.memories[shm.id] = shm

    def ring(self, *ids: int) -> None:
        for id in ids:
            signal = self.memories[id].signal
            assert signal is not None
            signal.inject()


class Recorder(Wake):
    """What a driver's interrupt handler is: called once for each SHMSIGNAL taken."""

    def __init__(self, handler: Callable[[], None]) -> None:
        super().__init__()
        self.handler = handler

    def ring(self) -> None:
        self.handler()
        super().ring()


class Stage:
    """A guest that shares memories with a Bell; `handled` are the signals in order."""

    def __init__(self, bell: Bell, bridge: BridgeDriver, device: DeviceProxy) -> None:
        self.bell = bell
        self.bridge = bridge
        self.device = device
        self.handled: list[int] = []
        self.on_signal: Callable[[int], None] = lambda id: None

    async def share(self, id: int, prio: int) -> None:
        buffer = self.device.allocate(64)
        ShmSignal.format(buffer.view, 0)

        def handle() -> None:
            assert shm.signal is not None
            shm.signal.wakeup_begin()
            self.handled.append(id)
            self.on_signal(id)
            shm.signal.wakeup_end()

        shm = await self.device.shm(
            id, buffer, signal_offset=0, prio=prio, wake=Recorder(handle)
        )
        assert shm.signal is not None
        shm.signal.enable()

    @property
    def interrupts(self) -> tuple[int, ...]:
        return self.bridge.statistics().interrupts.by_vector


@pytest.fixture(params=["extended", "compat"])
def compat(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "compat")


@pytest.fixture
async def stage(host: Host, compat: bool) -> AsyncIterator[Stage]:
    host.model.classes["bell"] = Bell
    bell = host.add("bell0", "bell")
    assert isinstance(bell, Bell)
    async with attach(await host.add_guest(), compat=compat) as bridge:
        device = await bridge.device(0)
        async with device.opened():
            yield Stage(bell, bridge, device)


async def test_many_signals_are_one_interrupt(stage: Stage) -> None:
    """R6: the heavier the load, the fewer interrupts per event."""
    for id in range(100):
        await stage.share(id, 0)
    per_signal = []
    for burst in (1, 10, 100):
        before, handled = sum(stage.interrupts), len(stage.handled)
        for first in range(0, 100, burst):
            stage.bell.ring(*range(first, first + burst))
            await until(lambda done=handled + first + burst: len(stage.handled) == done)
            await trio.testing.wait_all_tasks_blocked()
        per_signal.append((sum(stage.interrupts) - before) / 100)
    assert per_signal == [1.0, 0.1, 0.01]


async def test_signals_during_the_drain_raise_no_interrupt(stage: Stage) -> None:
    """R6: while the guest is draining, further signals join the same ring."""
    for id in range(50):
        await stage.share(id, 0)

    def chain(id: int) -> None:
        if id + 1 < 50:
            stage.bell.ring(id + 1)

    stage.on_signal = chain
    before = sum(stage.interrupts)
    stage.bell.ring(0)
    await until(lambda: len(stage.handled) == 50)
    assert stage.handled == list(range(50))
    assert sum(stage.interrupts) - before == 1


async def test_a_signal_is_outstanding_at_most_once(stage: Stage) -> None:
    """R6: a signal the guest has not handled yet is not queued again."""
    await stage.share(0, 0)
    stage.bell.ring(*[0] * 1000)
    await until(lambda: stage.handled)
    await trio.testing.wait_all_tasks_blocked()
    assert stage.handled == [0]


async def test_the_most_urgent_signal_is_handled_first(
    stage: Stage, compat: bool
) -> None:
    """R7: queued last, handled first; with one queue there is one order only."""
    for prio in range(8):
        await stage.share(prio, prio)
    stage.bell.ring(*range(8))
    await until(lambda: len(stage.handled) == 8)
    forwards = list(range(8))
    assert stage.handled == (forwards if compat else forwards[::-1])


@pytest.mark.parametrize("compat", [False])
async def test_a_flood_holds_up_an_urgent_signal_for_one_batch_at_most(
    stage: Stage,
) -> None:
    """R7: priority 7 overtakes all of the flood but the batch that is being taken."""
    flood = range(200)
    for id in flood:
        await stage.share(id, 0)
    await stage.share(777, 7)
    await stage.share(333, 3)

    def during(id: int) -> None:
        if id == 40:  # in the second batch of 32
            stage.bell.ring(333, 777)

    stage.on_signal = during
    stage.bell.ring(*flood)
    await until(lambda: len(stage.handled) == 202)
    assert stage.handled.index(777) == 64
    assert stage.handled.index(333) == 65
    assert [id for id in stage.handled if id < 200] == list(flood)


def post(host: Host, kind: int, handle: int, text: bytes = b"") -> None:
    """Have the host send an event it would not send by itself."""
    host.bridges["g1"].events.post(Event(kind, handle, text))  # type: ignore[arg-type]


async def test_events_of_no_meaning_to_us_are_skipped(host: Host, stage: Stage) -> None:
    """ABI 4.1: an unknown kind, an unknown device, a cookie that is no more."""
    await stage.share(0, 0)
    post(host, 9, 0)
    post(host, EventId.DEVDROP, 555)
    post(host, EventId.SHMSIGNAL, 555)
    post(host, EventId.SHMCLOSE, 555)
    stage.bell.ring(0)
    await until(lambda: stage.handled == [0])
    events = stage.bridge.statistics().events
    assert events["unknown"] == 1
    assert events["devdrop"] == 1


async def test_a_host_that_adds_a_device_twice_is_left(host: Host) -> None:
    host.add("echo0")
    path = await host.add_guest()

    async def guest() -> None:
        async with attach(path) as bridge:
            await bridge.device(0)
            post(host, EventId.DEVADD, 0, b"org.vbus.echo")
            await trio.sleep_forever()

    with pytest.raises(ProtocolError, match="added device 0 twice"):
        await guest()
