"""What one daemon tells the next: the format, read as a stranger's, and a bridge that
goes on in another one's place."""

import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from proxy.guest import attach
from shm import Doorbell, create_memfd
from vbus import Device, SharedMemory, abi, saved
from vbus.abi import EventId
from vbus.bus import BusModel
from vbus.device import Connection
from vbus.errors import InvalidError, VbusError
from vbus.saved import (
    Held,
    Kept,
    Running,
    SavedBridge,
    SavedClient,
    SavedInterrupts,
    SavedRange,
    SavedStream,
    State,
)
from vbus.testing import RecordedBridge, now
from vbus.vfio_user.server import VfioUserServer


class Sink(Device):
    """Remembers a word for each connection."""

    type = "org.vbus.sink"
    max_connections = 4

    def setup(self) -> None:
        self.words: dict[int, bytes] = {}

    def call(self, connection: Connection, func: int, data: bytes, flags: int) -> bytes:
        before = self.words.get(connection.handle, b"")
        self.words[connection.handle] = data
        return before

    def save(self, connection: Connection) -> bytes:
        return b"word " + self.words.get(connection.handle, b"")

    def resume(
        self, connection: Connection, state: bytes, shared: Sequence[SharedMemory]
    ) -> None:
        if not state.startswith(b"word "):
            raise InvalidError("no word")
        self.words[connection.handle] = state.removeprefix(b"word ")


# The format


def test_a_state_comes_back_as_it_was() -> None:
    state = State(
        {"bus": [{"name": "bus0"}]}, Running(0, {}, {}, {"tap0": 1}, ("vbus/state.1",))
    )
    fd = saved.write(state)
    try:
        assert saved.read(fd) == state
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (b"\xc1\xff", "cannot be read"),
        (msgspec.msgpack.encode({"version": 2}), "has version 2"),
        (msgspec.msgpack.encode({"version": 1}), "config"),
        (msgspec.msgpack.encode({"version": 1, "config": {}, "x": 1}), "`x`"),
        (b"\x91" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_state_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidError, match=why):
        saved.parse(data)


def test_a_file_that_can_still_change_is_no_state(tmp_path: Path) -> None:
    state = msgspec.msgpack.encode(State({}))
    (tmp_path / "file").write_bytes(state)
    fd = os.memfd_create("state", os.MFD_ALLOW_SEALING)
    os.write(fd, state)
    with pytest.raises(InvalidError, match="not sealed"):
        saved.read(fd)
    os.close(fd)
    with (
        (tmp_path / "file").open("rb") as file,
        pytest.raises(InvalidError, match="no memfd"),
    ):
        saved.read(file.fileno())


def test_a_descriptor_is_given_once_and_the_rest_are_closed() -> None:
    fds = [create_memfd("a", 4096), create_memfd("b", 4096)]
    held = Held(fds)
    taken = held.take(0)
    for index in (0, 2):
        with pytest.raises(InvalidError, match=f"no descriptor {index}"):
            held.take(index)
    held.close()
    os.close(taken)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fds[1])


# A bridge


def before() -> RecordedBridge:
    """A guest with two connections, signals, queues, and events that wait."""
    recorded = RecordedBridge({"sink": Sink})
    for number in range(3):
        recorded.add(f"sink{number}", "sink")
    peer = recorded.peer
    now(peer.start(abi.CAP_NAMES | abi.CAP_MULTIQUEUE, queues=2, size=8))
    peer.take_events()
    for devid in range(2):
        handle = now(peer.open(devid))
        now(peer.call(handle, 0, b"%d" % devid))
        for id in range(2):
            shared = now(peer.share(handle, id, 64, signal_offset=0, prio=devid))
            peer.memory.write(shared.addr + 8, b"\1")
    return recorded


def save(recorded: RecordedBridge) -> tuple[SavedBridge, list[int]]:
    """Give the state, by way of msgpack, and the descriptors as the next one's."""
    kept = Kept()
    state = recorded.bridge.save(kept)
    data = msgspec.msgpack.encode(state)
    fds = [os.dup(fd) for fd in kept.fds]
    return msgspec.msgpack.decode(data, type=SavedBridge), fds


def after(names: int = 3) -> RecordedBridge:
    """A bridge in another process's place, with as many of the devices."""
    model = BusModel({"sink": Sink})
    bus = model.add_bus("test")
    bus.skip_ids(3)
    for number in range(names):
        model.add_device(f"sink{number}", "sink")
        model.link("test", f"sink{number}", number)
    recorded = RecordedBridge(model=model, bus=bus)
    recorded.peer.detach()
    return recorded


def taken_over(new: RecordedBridge, old: RecordedBridge) -> None:
    """Have the guest of `old` go on with `new`."""
    state, fds = save(old)
    held = Held(fds)
    old.peer.bridge = new.bridge
    new.bridge.attach(old.peer)
    new.bridge.resume(state, held)
    held.close()


def south(recorded: RecordedBridge) -> list[SharedMemory]:
    return [shm for one in recorded.bridge.connections for shm in one.shm.values()]


def test_the_next_bridge_goes_on_with_handles_calls_and_signals() -> None:
    old, new = before(), after()
    handles = [one.handle for one in old.bridge.connections]
    signals = [shm.handle for shm in south(old)]
    taken_over(new, old)
    new.check()
    assert [one.handle for one in new.bridge.connections] == handles
    assert [shm.handle for shm in south(new)] == signals
    for number, handle in enumerate(handles):
        assert now(old.peer.call(handle, 0, b"?"))[1] == b"%d" % number
    for shm in south(new):
        assert shm.signal is not None
        shm.signal.inject()
    told = [event.eventid for event in old.peer.take_events()]
    assert told == [EventId.SHMSIGNAL] * 4
    shared = now(old.peer.share(handles[0], 7, 64, signal_offset=0))
    assert shared.handle == max(signals) + 1  # type: ignore[type-var, operator]
    assert new.add("later", "sink").id == 3
    new.check()
    new.bridge.close()
    old.close()


def test_a_doorbell_is_the_same_eventfd_before_and_after() -> None:
    """R60: a client may hold it, and rings it without a message."""
    old, new = before(), after()
    bells = [os.dup(shm.woken().fileno()) for shm in south(old)]
    taken_over(new, old)
    for fd, shm in zip(bells, south(new), strict=True):
        Doorbell.adopt(fd).ring()
        assert shm.woken().drain() == 1
    new.bridge.close()
    old.close()


def test_events_that_wait_are_neither_lost_nor_doubled() -> None:
    """R6, R60: the queue is full when the daemon is replaced."""
    old, new = before(), after()
    for number in range(20):
        old.add(f"more{number}", "sink")
        new.bus.skip_ids(4 + number)
    for shm in south(old):
        assert shm.signal is not None
        shm.signal.inject()
    assert old.bridge.events.waiting
    taken_over(new, old)
    new.bridge.validate()
    told = []
    while events := old.peer.take_events():
        told += events
        new.effects.answer_doorbells()
    added = [one.handle for one in told if one.eventid == EventId.DEVADD]
    assert added == list(range(3, 23))
    assert sum(one.eventid == EventId.SHMSIGNAL for one in told) == 4
    assert new.bridge.events.waiting == 0
    new.bridge.close()
    old.close()


def test_of_a_device_that_is_gone_the_guest_is_told() -> None:
    """R60: SHMCLOSE of each signal and DEVDROP, as if it had just been unplugged."""
    old, new = before(), after(names=1)
    taken_over(new, old)
    new.bridge.missing(range(3))
    assert len(new.bridge.connections) == 1
    events = [(one.eventid, one.handle) for one in old.peer.take_events()]
    dropped = [handle for kind, handle in events if kind == EventId.DEVDROP]
    assert dropped == [1, 2]
    assert [kind for kind, _ in events].count(EventId.SHMCLOSE) == 2
    new.check()
    new.bridge.close()
    old.close()


def test_a_device_that_cannot_go_on_ends_its_connection_alone() -> None:
    old, new = before(), after()
    sink = old.model.device("sink0")
    assert isinstance(sink, Sink)
    first = old.bridge.connections[0].handle
    sink.words[first] = 5  # type: ignore[assignment]
    taken_over(new, old)
    (left,) = new.bridge.connections
    assert left.device.name == "sink1"
    told = [one.eventid for one in old.peer.take_events()]
    assert told.count(EventId.SHMCLOSE) == 2
    new.bridge.validate()
    new.bridge.close()
    old.close()


def test_a_state_that_lies_ends_in_a_refusal_and_leaks_nothing() -> None:
    """Every number changed, every descriptor of the wrong kind or twice."""
    old = before()
    old.add("more", "sink")
    chance = random.Random(60)
    refused = 0
    baseline = len(os.listdir("/proc/self/fd"))
    for _ in range(150):
        state, fds = save(old)
        lie = _bent_state(state, chance)
        if chance.random() < 0.3:
            chance.shuffle(fds)
        held, new = Held(fds), after()
        new.bridge.attach(old.peer)
        try:
            new.bridge.resume(lie, held)
            new.bridge.validate()
        except (VbusError, OSError):
            refused += 1
        held.close()
        new.bridge.close()
        new.peer.close()
    assert refused > 50
    assert len(os.listdir("/proc/self/fd")) == baseline
    old.close()


def _bent_state(state: SavedBridge, chance: random.Random) -> SavedBridge:
    plain = msgspec.to_builtins(state, builtin_types=(bytes,))
    return msgspec.convert(_bent(plain, chance), SavedBridge)


def _bent(value: object, chance: random.Random) -> object:
    """Change about one number in thirty."""
    if isinstance(value, dict):
        return {key: _bent(one, chance) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_bent(one, chance) for one in value]
    number = isinstance(value, int) and not isinstance(value, bool)
    if number and chance.random() < 1 / 30:
        return chance.choice([0, 1, 7, 4096, (1 << 20) - 1])
    return value


# A server


def client_of(fd: int, memory: int) -> SavedClient:
    """A client at socket `fd`, with a range of memory in `memory`."""
    return SavedClient(
        SavedStream(fd, b"", (), (), 0, {}),
        8,
        1 << 20,
        SavedInterrupts((), (), ()),
        SavedBridge(
            (SavedRange(0, 4096, 0, True, False, memory),), bytes(256), b"", b"", None
        ),
    )


@pytest.mark.parametrize("with_socket", [False, True])
async def test_a_client_that_cannot_be_taken_over_is_cut_off(
    tmp_path: Path, with_socket: bool
) -> None:
    """R50, R60: no socket, or an eventfd for memory; the next client is served."""
    ours, theirs = socket.socketpair()
    eventfd = os.eventfd(0)
    fds = [theirs.detach() if with_socket else os.dup(eventfd), eventfd]
    with RecordedBridge() as recorded, ours:
        recorded.peer.detach()
        server = VfioUserServer(
            recorded.bridge,
            tmp_path / "g1.sock",
            resumed=client_of(0, 1),
            held=(held := Held(fds)),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            held.close()
            with trio.fail_after(10):
                if with_socket:
                    await trio.lowlevel.wait_readable(ours)
                    assert ours.recv(1) == b""
                async with attach(tmp_path / "g1.sock", memory_mib=1):
                    assert server.attached
            nursery.cancel_scope.cancel()
    theirs.close()
