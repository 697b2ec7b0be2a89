"""A guest that writes garbage wherever it can; a second guest must not notice."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ioq import ring_size
from vbus import Connection, Device, SharedMemory, abi, call
from vbus.bus import BusModel
from vbus.pci.constants import Region
from vbus.testing import GuestPeer, RecordedBridge, now

LOOKED_AT = 1 << 20
U32 = st.one_of(st.integers(0, 8), st.integers(0, 0xFFFFFFFF))
U64 = st.one_of(
    st.integers(0x1230_0000, 0x1230_0000 + (1 << 20)),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, (1 << 64) - 1, (1 << 64) - 64, 0x1230_0000 + (1 << 20) - 4]),
)


class Echo(Device):
    type = "org.vbus.echo"
    max_connections = 64

    @call(0)
    def echo(self, connection: Connection, data: bytes) -> bytes:
        return data

    def share(self, connection: Connection, shm: SharedMemory) -> None:
        if shm.signal is not None:
            shm.signal.inject()


class Pair:
    """A hostile guest and a bystander on one bus."""

    def __init__(self) -> None:
        self.hostile = RecordedBridge({"echo": Echo})
        self.model: BusModel = self.hostile.model
        self.other = RecordedBridge(model=self.model, bus=self.hostile.bus)
        self.hostile.add("echo0", "echo")
        self.peer: GuestPeer = self.hostile.peer
        now(self.other.peer.start())
        self.handle = now(self.other.peer.open(0))
        now(self.peer.start(3, queues=2, size=8))

    def check(self) -> None:
        self.hostile.check()
        self.other.check()
        assert now(self.other.peer.call(self.handle, 0, b"fine")) == (0, b"fine")

    def close(self) -> None:
        self.check()
        self.hostile.close()
        self.other.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def recover(pair: Pair) -> int:
    """NEGOTIATE brings any guest back."""
    peer = pair.peer
    if not pair.hostile.bridge.bus_master:
        peer.set_bus_master(True)
    peer._free = peer._call_block + 4096
    now(peer.start(3, queues=2, size=8))
    handle = now(peer.open(0))
    assert now(peer.call(handle, 0, b"back")) == (0, b"back")
    pair.check()
    return handle


@settings(max_examples=150, deadline=None)
@given(
    accesses=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 7]),
            st.integers(0, 255),
            st.binary(min_size=1, max_size=8),
        ),
        max_size=30,
    )
)
def test_any_register_access(
    pair: Pair, accesses: list[tuple[int, int, bytes]]
) -> None:
    """R53 too: configuration space included."""
    bridge = pair.hostile.bridge
    for region, offset, data in accesses:
        limit = bridge.region(region).size
        offset %= limit
        data = data[: limit - offset]
        assert bridge.write(region, offset, data) is None
        answer = bridge.read(region, offset, len(data))
        assert isinstance(answer, bytes)
        assert len(answer) == len(data)
    assert bridge.read(Region.CONFIG, 0, 4) == bytes.fromhex("da110020")
    recover(pair)


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(st.tuples(U32, U32, U64), max_size=10))
def test_any_bridge_call(pair: Pair, calls: list[tuple[int, int, int]]) -> None:
    for vector, length, gpa in calls:
        now(pair.peer.bridge_call_at(vector, length, gpa))
        pair.check()
    recover(pair)


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 9),
    entries=st.lists(st.tuples(U32, U64, U64), min_size=9, max_size=9),
    cut=st.integers(-1, 1),
)
def test_any_qreg(
    pair: Pair, count: int, entries: list[tuple[int, int, int]], cut: int
) -> None:
    now(pair.peer.negotiate(3))
    raw = abi.pack_qreg([abi.QueueEntry(*entry) for entry in entries[:count]])
    now(pair.peer.bridge_call(1, raw + b"\0" if cut > 0 else raw[: len(raw) + cut]))
    pair.check()
    recover(pair)


@settings(max_examples=250, deadline=None)
@given(
    vector=st.integers(0, 4),
    fields=st.tuples(U32, U32, U32, U32, U32, U64, U64),
    own=st.booleans(),
)
def test_any_call_structure(
    pair: Pair, vector: int, fields: tuple[int, ...], own: bool
) -> None:
    """With a handle of its own, so that the other fields are reached."""
    handle = recover(pair)
    a, b, c, offset, prio, cookie, gpa = fields
    first = handle if own else cookie
    argument = {
        0: abi.DEVOPEN.pack(abi.DeviceOpen(a, b, cookie)),
        1: abi.DEVCLOSE.pack(abi.DeviceClose(first)),
        2: abi.DEVCALL.pack(abi.DeviceCall(first, a % 2, b, c, gpa)),
        3: abi.DEVSHM.pack(abi.DeviceShm(first, a, b, c, offset, prio, cookie, gpa)),
        4: abi.DEVOPEN_NAME.pack(
            abi.DeviceOpenName(a, cookie.to_bytes(8, "little") * 8, b, cookie)
        ),
    }[vector]
    now(pair.peer.hypercall(vector, argument))
    pair.check()


@settings(max_examples=250, deadline=None)
@given(
    queue=st.integers(0, 1),
    writes=st.lists(
        st.tuples(st.integers(0, ring_size(8) - 1), st.binary(min_size=1, max_size=16)),
        min_size=1,
        max_size=8,
    ),
    changes=st.integers(1, 12),
)
def test_any_event_ring(
    pair: Pair, queue: int, writes: list[tuple[int, bytes]], changes: int
) -> None:
    """Heads, tails, owners, addresses, lengths and signal bytes."""
    recover(pair)
    peer = pair.peer
    target = peer.queues[queue].view
    others = peer.memory.read(peer.base, LOOKED_AT)
    ring_range = range(target.addr, target.addr + target.size)
    for at, data in writes:
        peer.memory.write(target.addr + at, data[: target.size - at])
    for number in range(changes):
        pair.hostile.add(f"more{number}", "echo")
        pair.model.remove_device(f"more{number}")
        peer.signal(abi.SIGNAL_EVENTQ, queue)
        pair.hostile.effects.answer_doorbells()
        pair.check()
    _only_these_changed(peer, others, ring_range)
    pair.other.peer.take_events()


def _only_these_changed(peer: GuestPeer, before: bytes, ring: range) -> None:
    """The host wrote into rings and event buffers, and nowhere else."""
    allowed = [ring]
    for queue in peer.queues:
        allowed.append(range(queue.view.addr, queue.view.addr + queue.view.size))
        allowed.append(range(queue.data, queue.data + 8 * abi.EVENT_SIZE))
    after = bytearray(peer.memory.read(peer.base, LOOKED_AT))
    for block in allowed:
        start = block.start - peer.base
        after[start : start + len(block)] = before[start : start + len(block)]
    assert after == before


def test_random_hammer(pair: Pair) -> None:
    """Everything at once, in the order of a fixed seed."""
    noise = random.Random(20)
    peer, bridge = pair.peer, pair.hostile.bridge
    for round in range(300):
        for _ in range(10):
            bridge.write(0, 4 * noise.randrange(16), noise.randbytes(4))
            bridge.write(
                1, 4 * noise.randrange(8), noise.randrange(9).to_bytes(4, "little")
            )
            at = peer.base + noise.randrange(1 << 16)
            peer.memory.write(at, noise.randbytes(noise.randrange(1, 64)))
            now(peer.bridge_call_at(noise.randrange(6), 16, peer.base))
        pair.hostile.effects.answer_doorbells()
        if round % 25 == 0:
            recover(pair)
    pair.check()
