"""The registers of the bridge and its bridge calls: ABI sections 1 and 2, and 12.2."""

import struct
from collections.abc import Iterator
from errno import EEXIST, EFAULT, EINVAL, ENOSPC

import pytest

from vbus import Connection, Device, abi, call
from vbus.abi import BridgeCall, EventId
from vbus.bridge import CHANNEL_LIMIT
from vbus.pci.constants import Irq, Region
from vbus.testing import GuestPeer, RecordedBridge, now
from vbus.testing.peer import STALE_RESULT

UNMAPPED = 0x7780_0000_0000


class Echo(Device):
    type = "org.vbus.echo"

    @call(0)
    def echo(self, connection: Connection, data: bytes) -> bytes:
        return data


@pytest.fixture
def recorded() -> Iterator[RecordedBridge]:
    with RecordedBridge({"echo": Echo}) as recorded:
        recorded.add("echo0", "echo")
        yield recorded


@pytest.fixture
def peer(recorded: RecordedBridge) -> GuestPeer:
    return recorded.peer


def negotiate(
    magic: int = abi.NEGOTIATE_MAGIC, version: int = 1, offer: int = 0
) -> bytes:
    return abi.NEGOTIATE.pack(abi.Negotiate(magic, version, offer))


# Configuration space

HEAD = (
    "da110020 00001000 02008006 00000000"  # ids, command, status, class, type 0
    "00000000 01000000 00000000 00000000"  # BAR0 memory, BAR1 ports, BAR2 memory
    "00000000 00000000 00000000 f41a0011"  # subsystem
    "00000000 40000000 00000000 00010000"  # capabilities at 0x40, INTA#
)
MSI = "05500000 00000000 00000000 00000000"
MSI_ALONE = "05000000 00000000 00000000 00000000"
MSIX = "11000700 02000000 02080000 00000000"


@pytest.mark.parametrize("devices", [0, 1, 1000])
@pytest.mark.parametrize("msix", [True, False])
def test_one_function_is_the_whole_footprint(devices: int, msix: bool) -> None:
    """R1, R10: the same bytes, BARs and vectors for any number of devices."""
    with RecordedBridge({"echo": Echo}, msix=msix) as recorded:
        for number in range(devices):
            recorded.add(f"echo{number}", "echo")
        now(recorded.peer.start())
        recorded.peer.set_bus_master(False)
        recorded.bridge.write(Region.CONFIG, 4, b"\0\0")
        capabilities = MSI + MSIX if msix else MSI_ALONE
        expected = bytes.fromhex(HEAD + capabilities).ljust(256, b"\0")
        assert recorded.bridge.read(Region.CONFIG, 0, 256) == expected
        sizes = [recorded.bridge.region(index).size for index in range(9)]
        assert sizes == [64, 32, 4096 if msix else 0, 0, 0, 0, 0, 256, 0]
        vectors = [recorded.bridge.irq_count(index) for index in range(3)]
        assert vectors == [1, 1, 8 if msix else 0]


# BAR0


def test_narrow_accesses_to_the_registers_mean_nothing(peer: GuestPeer) -> None:
    """ABI 1.1: 8- and 16-bit writes are ignored, such reads give 0."""
    peer.memory.write(peer.base, negotiate())
    registers = abi.CALL.pack(abi.CallDescriptor(0, 16, peer.base))
    for at in range(16):
        peer.bridge.write(0, at, registers[at : at + 1])
    for at in range(0, 16, 2):
        peer.bridge.write(0, at, registers[at : at + 2])
    for size in (1, 2, 3, 8, 16):
        assert peer.bridge.read(0, 0, size) == bytes(size)
    assert peer.bridge.read(0, 0, 4) == struct.pack("<i", -EINVAL)  # length 0


def test_any_32_bit_read_runs_the_call_again(recorded: RecordedBridge) -> None:
    """ABI 1.1: at any offset, and the shadow keeps its content."""
    now(recorded.peer.negotiate())
    for offset in (0, 4, 60):
        assert recorded.bridge.read(0, offset, 4) == struct.pack("<i", 1)
    assert recorded.bridge.statistics().negotiations == 4


def test_64_bit_writes_are_two_of_32_bits(peer: GuestPeer) -> None:
    """ABI 12.2; a 64-bit read runs nothing."""
    peer.memory.write(peer.base, negotiate())
    registers = abi.CALL.pack(abi.CallDescriptor(0, 16, peer.base))
    peer.bridge.write(0, 0, registers[:8])
    peer.bridge.write(0, 8, registers[8:])
    assert peer.bridge.read(0, 0, 8) == bytes(8)
    assert peer.bridge.statistics().negotiations == 0
    peer.bridge.write(0, 4, b"\xff" * 8)  # not aligned: ignored
    assert peer.bridge.read(0, 0, 4) == struct.pack("<i", 1)


def test_signal_window_reads_as_zero(peer: GuestPeer) -> None:
    now(peer.start())
    assert peer.bridge.read(1, 0, 4) == bytes(4)


def test_other_widths_do_not_signal(peer: GuestPeer) -> None:
    """ABI 1.2: only 32-bit writes have a meaning."""
    now(peer.start())
    before = peer.bridge.statistics()
    for width in (1, 2, 8):
        for offset in (0, 4, 8):
            assert peer.bridge.write(1, offset, bytes(width)) is None
    assert peer.bridge.statistics() == before


# NEGOTIATE


def test_negotiate_wants_its_exact_length(peer: GuestPeer) -> None:
    for size in (0, 15, 17, 1 << 31):
        assert now(peer.bridge_call_at(BridgeCall.NEGOTIATE, size, peer.base)) == (
            -EINVAL
        )


def test_negotiate_outside_of_memory_faults(peer: GuestPeer) -> None:
    assert now(peer.bridge_call_at(BridgeCall.NEGOTIATE, 16, UNMAPPED)) == -EFAULT


def test_wrong_magic_does_nothing(recorded: RecordedBridge) -> None:
    """ABI 2.3: not even a reset."""
    peer = recorded.peer
    now(peer.start())
    handle = now(peer.open(0))
    result, after = now(peer.bridge_call(0, negotiate(magic=1, offer=3)))
    assert result == -EINVAL
    assert after == negotiate(magic=1, offer=3)
    assert now(peer.call(handle, 0, b"still open")) == (0, b"still open")


def test_wrong_version_resets_and_refuses(recorded: RecordedBridge) -> None:
    """ABI 2.3: the reset happens though the version then mismatches."""
    peer = recorded.peer
    now(peer.start())
    now(peer.open(0))
    result, after = now(peer.bridge_call(0, negotiate(version=2, offer=3)))
    assert result == -EINVAL
    assert after == negotiate(version=2, offer=0)
    assert recorded.bridge.connections == []
    assert now(peer.add_channel(1)) == -EINVAL
    recorded.check()


@pytest.mark.parametrize(
    ("offer", "accepted"), [(0, 0), (1, 1), (2, 2), (3, 3), ((1 << 64) - 1, 3)]
)
def test_capabilities_are_those_both_sides_have(
    peer: GuestPeer, offer: int, accepted: int
) -> None:
    assert now(peer.negotiate(offer)) == 1
    assert peer.capabilities == accepted


def test_nothing_but_negotiate_works_before_it(peer: GuestPeer) -> None:
    """ABI 2.5."""
    for vector, size in ((1, 32), (2, 16), (3, 16), (4, 4)):
        assert now(peer.bridge_call_at(vector, size, peer.base)) == -EINVAL


@pytest.mark.parametrize("vector", [4, 5, 6, 0xFFFFFFFF])
def test_unknown_bridge_calls_are_refused(peer: GuestPeer, vector: int) -> None:
    """FASTCALL_DROP among them, as the VMM had no case for it (ABI 2.3)."""
    now(peer.start())
    assert now(peer.bridge_call_at(vector, 4, peer.base)) == -EINVAL
    assert now(peer.bridge_call_at(vector, 16, peer.base)) == -EINVAL


# QREG


def qreg(
    peer: GuestPeer, *entries: tuple[int, int, int], count: int | None = None
) -> int:
    raw = bytearray(abi.pack_qreg([abi.QueueEntry(*entry) for entry in entries]))
    if count is not None:
        raw[:4] = struct.pack("<I", count)
    return now(peer.bridge_call(BridgeCall.QREG, bytes(raw)))[0]


def ring_at(peer: GuestPeer, descriptors: int) -> tuple[int, int, int]:
    queue = peer._make_queue(descriptors)
    return descriptors, queue.view.addr, queue.data


def test_qreg_needs_one_queue_without_the_extension(peer: GuestPeer) -> None:
    """ABI 2.3: count 1 and 32 bytes, exactly."""
    now(peer.negotiate())
    ring = ring_at(peer, 4)
    assert qreg(peer, ring, ring_at(peer, 4)) == -EINVAL
    assert qreg(peer, ring, count=0) == -EINVAL
    assert qreg(peer, ring, count=2) == -EINVAL
    assert now(peer.bridge_call_at(BridgeCall.QREG, 8, peer.base)) == -EINVAL
    assert qreg(peer, ring) == 0
    assert qreg(peer, ring) == -EINVAL  # twice


@pytest.mark.parametrize("queues", range(1, 10))
def test_qreg_takes_up_to_eight_queues_when_negotiated(
    recorded: RecordedBridge, queues: int
) -> None:
    """R7, extension."""
    peer = recorded.peer
    now(peer.negotiate(abi.CAP_MULTIQUEUE))
    expected = 0 if queues <= 8 else -EINVAL
    assert now(peer.register_queues(queues, 4)) == expected
    assert recorded.bridge.statistics().queues == (queues if queues <= 8 else 0)
    recorded.check()


def test_qreg_refuses_bad_rings_and_keeps_nothing(recorded: RecordedBridge) -> None:
    peer = recorded.peer
    now(peer.negotiate(abi.CAP_MULTIQUEUE))
    good = ring_at(peer, 4)
    count, ring, data = good
    end = peer.base + peer.size
    bad = [
        ((0, ring, data), -EINVAL),
        ((2049, ring, data), -EINVAL),
        ((5, ring, data), -EINVAL),  # size of the ring
        ((count, data, data), -EINVAL),  # magic
        ((count, UNMAPPED, data), -EFAULT),
        ((count, (1 << 64) - 64, data), -EFAULT),  # wraps
        ((count, ring, UNMAPPED), -EFAULT),
        ((count, ring, end - 144), -EFAULT),
    ]
    for entry, result in bad:
        assert qreg(peer, good, entry) == result, entry
        assert recorded.bridge.statistics().queues == 0
        assert not recorded.effects.watched
        recorded.check()
    assert qreg(peer, good) == 0


# FASTCALL_ADD and fast calls


def add_channel(peer: GuestPeer, id: int, length: int, gpa: int) -> int:
    argument = abi.CALL.pack(abi.CallDescriptor(id, length, gpa))
    return now(peer.bridge_call(BridgeCall.FASTCALL_ADD, argument))[0]


def test_fastcall_add_errors(peer: GuestPeer) -> None:
    now(peer.negotiate())
    assert add_channel(peer, 0, 23, peer.base) == -EINVAL
    assert add_channel(peer, 0, 24, UNMAPPED) == -EFAULT
    assert add_channel(peer, 0, 24, peer.base + peer.size - 23) == -EFAULT
    assert add_channel(peer, 0, 24, peer.base + 5) == 0  # no alignment is required
    assert add_channel(peer, 0, 24, peer.base) == -EEXIST
    assert add_channel(peer, 0xFFFFFFFF, 24, peer.base) == 0
    assert now(peer.bridge_call_at(BridgeCall.FASTCALL_ADD, 15, peer.base)) == -EINVAL


def test_channels_are_limited(peer: GuestPeer) -> None:
    now(peer.negotiate())
    for id in range(CHANNEL_LIMIT):
        assert add_channel(peer, id, 24, peer.base) == 0
    assert add_channel(peer, CHANNEL_LIMIT, 24, peer.base) == -ENOSPC


def test_unknown_channel_writes_nothing(peer: GuestPeer) -> None:
    """ABI 2.4.4: the guest reads a stale result."""
    now(peer.start())
    peer._channels[9] = peer.allocate(24)
    assert now(peer.hypercall_at(0, 16, peer.base, channel=9)) == STALE_RESULT
    assert peer.bridge.statistics().refused_fast_calls == 1


def test_channel_whose_memory_went_writes_nothing(peer: GuestPeer) -> None:
    now(peer.start())
    peer.bridge.memory.unmap(peer.base, peer.size)
    assert now(peer.hypercall_at(0, 16, peer.base)) == STALE_RESULT


def test_slowcall_runs_the_same_hypercalls(peer: GuestPeer) -> None:
    now(peer.start())
    argument = abi.DEVOPEN.pack(abi.DeviceOpen(0, 1, 0))
    result, after = now(peer.hypercall(0, argument, channel=None))
    handle = abi.DEVOPEN.unpack(after).handle
    assert result == 0
    assert now(peer.call(handle, 0, b"x")) == (0, b"x")
    assert now(peer.bridge_call_at(BridgeCall.SLOWCALL, 15, peer.base)) == -EINVAL
    assert now(peer.bridge_call_at(BridgeCall.SLOWCALL, 16, UNMAPPED)) == -EFAULT


# Interrupts and leaving


def test_interrupts_follow_what_the_guest_set_up_last(
    recorded: RecordedBridge,
) -> None:
    """ABI 12.1: not sampled at QREG. With MSI-X each queue has its own vector."""
    peer = recorded.peer
    now(peer.start(abi.CAP_MULTIQUEUE, queues=8))
    for number, kind in enumerate([(Irq.INTX, 0), (Irq.MSI, 0), (Irq.MSIX, 7)]):
        peer.take_events()
        peer.vectors = {kind}
        recorded.add(f"more{number}", "echo")
        assert peer.interrupts[-1] == kind
    before = len(peer.interrupts)
    peer.take_events()
    peer.vectors = set()
    recorded.add("last", "echo")
    assert len(peer.interrupts) == before
    assert recorded.bridge.statistics().interrupts == before


def test_bus_mastering_off_means_hands_off(recorded: RecordedBridge) -> None:
    """ABI 12.2, leaving: no guest memory is touched, no interrupt is raised."""
    peer = recorded.peer
    now(peer.start())
    handle = now(peer.open(0))
    shared = now(peer.share(handle, 0, 64, signal_offset=0))
    peer.take_events()
    memory = recorded.bridge.connections[0].shm[0]
    interrupts = len(peer.interrupts)
    peer.set_bus_master(False)
    before = peer.memory.read(peer.base, peer.size)
    memory.notify()
    recorded.add("echo1", "echo")
    recorded.model.unlink("test", "echo0")
    peer.signal(abi.SIGNAL_FASTCALL, 0)
    peer.signal(abi.SIGNAL_SHM, shared.handle)
    assert peer.bridge.read(0, 0, 4) == struct.pack("<i", -EFAULT)
    assert peer.memory.read(peer.base, peer.size) == before
    assert len(peer.interrupts) == interrupts
    assert not shared.closed
    recorded.check()
    peer.set_bus_master(True)
    assert now(peer.bridge_call_at(1, 32, peer.base)) == -EINVAL  # negotiate anew
    now(peer.start())
    assert [event.handle for event in peer.take_events()] == [1]


@pytest.mark.parametrize("how", ["negotiate", "reset", "detach", "master"])
def test_every_reset_ends_all_that_the_guest_has(
    recorded: RecordedBridge, how: str
) -> None:
    """Connections, signals, channels, queues; then the guest starts anew."""
    peer, bridge = recorded.peer, recorded.bridge
    now(peer.start())
    handle = now(peer.open(0))
    now(peer.share(handle, 0, 64, signal_offset=0))
    if how == "negotiate":
        now(peer.negotiate())
    elif how == "reset":
        bridge.reset()
    elif how == "detach":
        peer.detach()
        peer.attach()
    else:
        peer.set_bus_master(False)
    after = bridge.statistics()
    assert (after.connections, after.signals, after.channels, after.queues) == (0,) * 4
    assert not recorded.effects.watched
    recorded.check()
    peer.set_bus_master(True)
    now(peer.start())
    assert [event.eventid for event in peer.take_events()] == [EventId.DEVADD]
    anew = now(peer.open(0))
    assert anew != handle
    assert now(peer.share(anew, 1, 64, signal_offset=0)).handle == 0


def test_doorbells_are_offered_as_eventfds_newest_first(
    recorded: RecordedBridge,
) -> None:
    """A guest process rings with one eventfd write and no message."""
    peer = recorded.peer
    now(peer.start(abi.CAP_MULTIQUEUE, queues=2))
    handle = now(peer.open(0))
    for id in range(3):
        now(peer.share(handle, id, 64, signal_offset=0))
    offered = recorded.bridge.io_eventfds(1, 16)
    assert [(fd.offset, fd.size, fd.datamatch) for fd in offered] == [
        (8, 4, 2),
        (8, 4, 1),
        (8, 4, 0),
        (0, 4, 1),
        (0, 4, 0),
    ]
    assert recorded.bridge.io_eventfds(1, 2) == offered[:2]
    assert recorded.bridge.io_eventfds(1, 4) == offered[:4]
    assert recorded.bridge.io_eventfds(0, 16) == []
    now(peer.close_device(handle))
    assert recorded.bridge.io_eventfds(1, 16) == offered[3:]
    peer.set_bus_master(False)
    assert recorded.bridge.io_eventfds(1, 16) == []


def test_doorbell_by_message_rings_the_eventfd(recorded: RecordedBridge) -> None:
    peer = recorded.peer
    now(peer.start())
    handle = now(peer.open(0))
    shared = now(peer.share(handle, 0, 64, signal_offset=0))
    doorbell = recorded.bridge.connections[0].shm[0].woken()
    peer.signal(abi.SIGNAL_SHM, shared.handle)
    assert doorbell.drain() == 1
    peer.signal(abi.SIGNAL_SHM, shared.handle + 1)  # unknown: ignored (ABI 3.5)
    assert doorbell.drain() == 0
    assert recorded.bridge.statistics().bad_doorbells == 1
