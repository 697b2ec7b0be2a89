"""Hypercalls: every result and every refusal of ABI section 3."""

import logging
import math
from collections.abc import Callable, Iterator
from errno import EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENOENT, ENOSPC

import pytest

from shm import ShmSignal
from vbus import Connection, Device, SharedMemory, abi, call, client
from vbus.abi import Hypercall
from vbus.errors import ExistsError, InvalidError, NoDeviceError, VbusError
from vbus.hypercall import DATA_LIMIT
from vbus.testing import GuestPeer, RecordedBridge, now

NULL_TRANSLATED = 0x7780_0000_0000  # what Linux sends for no data (ABI 12.2)


class Sample(Device):
    """One device with an answer of every kind."""

    type = "org.vbus.test"
    version = 3
    max_connections = 2
    seen: list[tuple[int, bytes, int]]

    def setup(self) -> None:
        self.seen = []

    @call(0)
    def echo(self, connection: Connection, data: bytes) -> bytes:
        return data

    @call(1)
    def record(self, connection: Connection, data: bytes, flags: int) -> None:
        self.seen.append((connection.handle, data, flags))

    @call(2)
    def number(self, connection: Connection, data: bytes) -> int:
        return int.from_bytes(data, "little", signed=True)

    @call(3)
    def both(self, connection: Connection, data: bytes) -> tuple[int, bytes]:
        return 7, data[::-1]

    @call(4)
    def longer(self, connection: Connection, data: bytes) -> bytes:
        return data + b"!"

    @call(5)
    def refuse(self, connection: Connection, data: bytes) -> None:
        raise NoDeviceError("no lower device")

    @call(6)
    def bug(self, connection: Connection, data: bytes) -> None:
        raise ZeroDivisionError

    @call(7)
    def nonsense(self, connection: Connection, data: bytes) -> bytes:
        return "text"  # type: ignore[return-value]

    @call(8)
    def huge(self, connection: Connection, data: bytes) -> int:
        return 1 << 31

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        if shm.id == 99:
            if shm.signal is not None:
                shm.signal.inject()
            raise ExistsError("not that one")
        if shm.id == 98:
            math.sqrt(-1)


class Closed(Device):
    """Lets nobody in."""

    type = "org.vbus.closed"
    error: VbusError | ZeroDivisionError = NoDeviceError("closed")

    def open(self, connection: Connection) -> None:
        raise self.error


@pytest.fixture
def recorded() -> Iterator[RecordedBridge]:
    with RecordedBridge({"sample": Sample, "closed": Closed}) as recorded:
        recorded.add("sample0", "sample")
        recorded.add("closed0", "closed")
        now(recorded.peer.start(abi.CAP_NAMES))
        yield recorded
        recorded.check()


@pytest.fixture
def peer(recorded: RecordedBridge) -> GuestPeer:
    return recorded.peer


@pytest.fixture
def handle(peer: GuestPeer) -> int:
    return now(peer.open(0, 3))


def refused(errno: int, operation: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        operation()
    assert caught.value.errno == errno


# The common path


@pytest.mark.parametrize(
    ("vector", "size"), [(0, 16), (1, 8), (2, 32), (3, 48), (4, 88)]
)
def test_lengths_are_exact_and_the_structure_is_guest_memory(
    peer: GuestPeer, vector: int, size: int
) -> None:
    for length in (0, size - 1, size + 1, 1 << 31):
        assert now(peer.hypercall_at(vector, length, peer.base)) == -EINVAL
    for gpa in (NULL_TRANSLATED, peer.base + peer.size - size + 1, (1 << 64) - 1):
        assert now(peer.hypercall_at(vector, size, gpa)) == -EFAULT


@pytest.mark.parametrize("vector", [5, 6, 0x7FFFFFFF, 0xFFFFFFFF])
def test_unknown_hypercalls_are_refused(peer: GuestPeer, vector: int) -> None:
    assert now(peer.hypercall_at(vector, 16, peer.base)) == -EINVAL


def test_names_belong_to_the_extension(recorded: RecordedBridge) -> None:
    """A guest that offers nothing gets the original protocol: call 4 is unknown."""
    now(recorded.peer.start())
    refused(EINVAL, lambda: now(recorded.peer.open_name("sample0", 3)))


# DEVOPEN


def test_open_gives_an_unguessable_handle(peer: GuestPeer) -> None:
    """R3: never 0, no counter, no pointer."""
    handles = [now(peer.open(0, 3)) for _ in range(2)]
    assert 0 not in handles
    assert abs(handles[0] - handles[1]) > 1 << 32


def test_open_errors(peer: GuestPeer, recorded: RecordedBridge) -> None:
    refused(ENOENT, lambda: now(peer.open(17, 3)))
    refused(ENOENT, lambda: now(peer.open(0xFFFFFFFF, 3)))
    refused(EINVAL, lambda: now(peer.open(0, 2)))
    refused(NoDeviceError.errno, lambda: now(peer.open(1)))
    now(peer.open(0, 3))
    now(peer.open(0, 3))
    refused(EBUSY, lambda: now(peer.open(0, 3)))
    assert recorded.model.device("closed0").connections == set()


def test_a_failed_open_leaves_no_trace(
    recorded: RecordedBridge, caplog: pytest.LogCaptureFixture
) -> None:
    device = recorded.model.device("closed0")
    assert isinstance(device, Closed)
    device.error = ZeroDivisionError("a bug")
    refused(EIO, lambda: now(recorded.peer.open(1)))
    assert "open of closed0 by guest failed" in caplog.text
    assert "ZeroDivisionError: a bug" in caplog.text
    assert recorded.effects.opened == []


def test_open_that_cannot_be_answered_does_not_happen(
    recorded: RecordedBridge,
) -> None:
    """The structure lies in read-only memory: -EFAULT and nothing is open."""
    peer = recorded.peer
    read_only = 0x4000_0000
    recorded.bridge.memory.map(read_only, 4096, peer.fd, writable=False)
    structure = abi.DEVOPEN.pack(abi.DeviceOpen(0, 3, 0))
    peer.memory.write(peer.base, structure)
    assert now(peer.hypercall_at(0, 16, read_only)) == -EFAULT
    assert recorded.effects.opened == []


def test_handles_are_checked_against_the_table(
    recorded: RecordedBridge, handle: int
) -> None:
    """R3: 0, unknown and closed handles fail before the device is reached."""
    peer = recorded.peer
    device = recorded.model.device("sample0")
    assert isinstance(device, Sample)
    now(peer.close_device(handle))
    for bad in (0, 1, handle, handle ^ 1, (1 << 64) - 1):
        refused(ENOENT, lambda bad=bad: now(peer.call(bad, 1, b"x")))
        refused(ENOENT, lambda bad=bad: now(peer.share(bad, 1, 64)))
        refused(ENOENT, lambda bad=bad: now(peer.close_device(bad)))
    assert device.seen == []


def test_another_guests_handle_does_not_resolve(
    recorded: RecordedBridge, handle: int
) -> None:
    """R3, R51: two guests on one bus."""
    with RecordedBridge(model=recorded.model, bus=recorded.bus) as other:
        now(other.peer.start())
        refused(ENOENT, lambda: now(other.peer.call(handle, 0, b"x")))
        mine = now(other.peer.open(0, 3))
        refused(ENOENT, lambda: now(recorded.peer.call(mine, 0, b"x")))
        assert now(recorded.peer.call(handle, 0, b"x")) == (0, b"x")


def test_old_handles_die_with_negotiate(peer: GuestPeer, handle: int) -> None:
    now(peer.start())
    refused(ENOENT, lambda: now(peer.call(handle, 0)))


# DEVOPEN_NAME


def test_open_by_name_gives_id_and_handle(
    recorded: RecordedBridge, peer: GuestPeer
) -> None:
    """R2, extension."""
    recorded.add("lan0.port-1", "sample")
    devid, handle = now(peer.open_name("lan0.port-1", 3))
    assert devid == 2
    assert now(peer.call(handle, 0, b"hi")) == (0, b"hi")


@pytest.mark.parametrize(
    "name", ["", "sample", "sample00", "x" * 64, "sample0\0x", "é"]
)
def test_open_by_unknown_name(peer: GuestPeer, name: str) -> None:
    refused(ENOENT, lambda: now(peer.open_name(name, 3)))


# DEVCALL


def test_answers_of_every_kind(peer: GuestPeer, handle: int) -> None:
    """R4: data, result, both, and refusals by errno."""
    assert now(peer.call(handle, 0, b"data")) == (0, b"data")
    assert now(peer.call(handle, 2, b"\x05\0\0\0")) == (5, b"\x05\0\0\0")
    assert now(peer.call(handle, 3, b"abc")) == (7, b"cba")
    refused(11, lambda: now(peer.call(handle, 2, b"\xf5")))
    refused(EINVAL, lambda: now(peer.call(handle, 4, b"abc")))
    refused(NoDeviceError.errno, lambda: now(peer.call(handle, 5)))
    refused(EINVAL, lambda: now(peer.call(handle, 1000)))


def test_flags_reach_the_device(
    recorded: RecordedBridge, peer: GuestPeer, handle: int
) -> None:
    device = recorded.model.device("sample0")
    assert isinstance(device, Sample)
    now(peer.call(handle, 1, b"in", 0xFFFFFFFF))
    assert device.seen == [(handle, b"in", 0xFFFFFFFF)]


@pytest.mark.parametrize("func", [6, 7, 8])
def test_a_bug_of_a_device_is_eio_and_logged(
    peer: GuestPeer, handle: int, func: int, caplog: pytest.LogCaptureFixture
) -> None:
    refused(EIO, lambda: now(peer.call(handle, func)))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert now(peer.call(handle, 0, b"goes on")) == (0, b"goes on")


def test_without_data_the_pointer_is_not_looked_at(
    peer: GuestPeer, handle: int
) -> None:
    """ABI 12.2."""
    argument = abi.DEVCALL.pack(abi.DeviceCall(handle, 0, 0, 0, NULL_TRANSLATED))
    assert now(peer.hypercall(Hypercall.DEVCALL, argument))[0] == 0


@pytest.mark.parametrize(
    ("length", "gpa", "result"),
    [
        (1, NULL_TRANSLATED, -EFAULT),
        (16, (1 << 64) - 8, -EFAULT),
        (DATA_LIMIT + 1, 0x1230_0000, -EINVAL),
        (0xFFFFFFFF, 0x1230_0000, -EINVAL),
        (DATA_LIMIT, 0x1230_0000, 0),
    ],
)
def test_data_is_bounded_guest_memory(
    peer: GuestPeer, handle: int, length: int, gpa: int, result: int
) -> None:
    argument = abi.DEVCALL.pack(abi.DeviceCall(handle, 1, length, 0, gpa))
    assert now(peer.hypercall(Hypercall.DEVCALL, argument))[0] == result


# DEVSHM


def shm(peer: GuestPeer, handle: int, **changes: int) -> int:
    """DEVSHM of 64 bytes with a good signal at 0, after `changes`."""
    addr = peer.allocate(4096)
    ShmSignal.format(peer.memory.view(addr, 16), 0)
    fields = abi.DeviceShm(handle, 5, 64, 0, 0, 0, 0xC00C1E, addr)._replace(**changes)
    return now(peer.hypercall(Hypercall.DEVSHM, abi.DEVSHM.pack(fields)))[0]


def test_signal_handles_count_from_zero_over_all_devices(
    peer: GuestPeer, handle: int
) -> None:
    """ABI 3.4: and are never reused, a close notwithstanding."""
    assert shm(peer, handle) == 0
    assert shm(peer, handle, id=6) == 1
    other = now(peer.open(0, 3))
    assert shm(peer, other) == 2
    now(peer.close_device(other))
    assert shm(peer, now(peer.open(0, 3))) == 3
    now(peer.start())
    assert shm(peer, now(peer.open(0, 3))) == 0


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"len": 0}, -EINVAL),
        ({"datap": (1 << 64) - 32}, -EINVAL),
        ({"datap": NULL_TRANSLATED}, -EFAULT),
        ({"len": 0xFFFFFFFF}, -EFAULT),
        ({"signal_offset": 49}, -EINVAL),
        ({"signal_offset": 0xFFFFFFFE}, -EINVAL),
        ({"signal_offset": 4}, -EINVAL),  # no magic there
        ({"len": 15}, -EINVAL),
        ({"id": 99}, -EEXIST),
        ({"prio": 0xFFFFFFFF}, 0),
        ({"prio": 0x80000000}, 0),
        ({"flags": 0xFFFFFFFF}, 0),
        ({"signal_offset": abi.NO_SIGNAL, "prio": 0xAAAAAAAA}, 0),
    ],
)
def test_devshm_is_checked(
    recorded: RecordedBridge, handle: int, changes: dict[str, int], result: int
) -> None:
    """ABI 3.4 and 10.2."""
    assert shm(recorded.peer, handle, **changes) == result
    recorded.check()
    if result:
        assert recorded.bridge.statistics().signals == 0
        assert shm(recorded.peer, handle) == 0


def test_an_id_can_be_shared_once(peer: GuestPeer, handle: int) -> None:
    assert shm(peer, handle) == 0
    assert shm(peer, handle) == -EEXIST
    assert shm(peer, handle, signal_offset=abi.NO_SIGNAL) == -EEXIST


def test_no_event_carries_the_cookie_of_a_failed_devshm(
    recorded: RecordedBridge, handle: int, caplog: pytest.LogCaptureFixture
) -> None:
    """ABI 10.2: though the device signalled it before it refused."""
    peer = recorded.peer
    peer.take_events()
    addr = peer.allocate(4096)
    ShmSignal.format(peer.memory.view(addr, 16), 0)
    ShmSignal(peer.memory.view(addr, 16), 0, 0, lambda: None).enable()
    assert shm(peer, handle, datap=addr, id=99) == -EEXIST
    assert shm(peer, handle, id=98) == -EIO
    now(peer.close_device(handle))
    assert peer.take_events() == []


def test_a_signal_during_devshm_is_kept_until_it_succeeded(
    recorded: RecordedBridge,
) -> None:
    order: list[str] = []

    class Eager(Sample):
        def share(self, connection: Connection, shm: SharedMemory) -> None:
            shm.notify()
            order.append(f"{len(recorded.peer.take_events())} events in share")

    recorded.model.classes["eager"] = Eager
    devid = recorded.add("eager0", "eager").id
    peer = recorded.peer
    peer.take_events()
    handle = now(peer.open(devid, 3))
    now(peer.share(handle, 1, 64, signal_offset=0))
    assert order == ["0 events in share"]
    assert [event.eventid for event in peer.take_events()] == [abi.EventId.SHMSIGNAL]


def test_signals_and_memories_are_limited(
    peer: GuestPeer, handle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One guest cannot use up the descriptors of the daemon."""
    monkeypatch.setattr(client, "SIGNAL_LIMIT", 2)
    monkeypatch.setattr(client, "SHM_LIMIT", 4)
    assert [shm(peer, handle, id=id) for id in range(3)] == [0, 1, -ENOSPC]
    without = {"signal_offset": abi.NO_SIGNAL}
    results = [shm(peer, handle, id=id, **without) for id in range(2, 5)]
    assert results == [0, 0, -ENOSPC]
    now(peer.close_device(handle))
    assert shm(peer, now(peer.open(0, 3))) == 2


def test_a_guest_that_takes_no_events_cannot_grow_the_backlog(
    recorded: RecordedBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BACKLOG_LIMIT", 8)
    peer = recorded.peer
    now(peer.negotiate())
    now(peer.add_channel())
    results = []
    for _ in range(20):
        handle = now(peer.open(0, 3))
        results.append(shm(peer, handle))
        now(peer.close_device(handle))
    assert results == [*range(8), *[-ENOSPC] * 12]
    assert recorded.bridge.statistics().events.waiting == 8


# DEVCLOSE


def test_close_ends_in_one_shmclose_for_each_signal(
    recorded: RecordedBridge, handle: int
) -> None:
    peer = recorded.peer
    peer.take_events()
    with_signal = [now(peer.share(handle, id, 64, signal_offset=0)) for id in range(3)]
    now(peer.share(handle, 3, 64))
    now(peer.close_device(handle))
    events = peer.take_events()
    assert [(event.eventid, event.handle) for event in events] == [
        (abi.EventId.SHMCLOSE, shared.cookie) for shared in with_signal
    ]


def test_memory_lives_until_the_device_closed(recorded: RecordedBridge) -> None:
    seen: list[bool] = []

    class Late(Sample):
        def close(self, connection: Connection) -> None:
            seen.extend(shm.view.alive for shm in connection.shm.values())
            raise InvalidError("a complaint nobody hears")

    recorded.model.classes["late"] = Late
    devid = recorded.add("late0", "late").id
    handle = now(recorded.peer.open(devid, 3))
    now(recorded.peer.share(handle, 1, 64))
    memory = recorded.bridge.connections[0].shm[1]
    now(recorded.peer.close_device(handle))
    assert seen == [True]
    assert not memory.view.alive
