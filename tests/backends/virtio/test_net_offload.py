"""virtio-net: checksum and segmentation, both ways."""

import random
import struct

import pytest

from backends.virtio.constants import Status, bits
from backends.virtio.net import VirtioNet
from backends.virtio.netheader import HEADER, Feature, Gso
from backends.virtio.uso import segment
from tests.backends.virtio.net_rig import (
    NONE,
    PLAIN,
    A,
    B,
    Wire,
    deliver,
    offered,
    post,
    received,
)
from tests.backends.virtio.rig import rigged
from tests.frames import (
    ECN,
    GSO,
    MAC_A,
    MAC_B,
    NEEDS_CSUM,
    TCP4,
    TCP6,
    checksum,
    ether,
    ip4,
    ip6,
    pseudo,
    segments,
    tcp_frame,
)
from vbus.errors import InvalidError


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def net(wire: Wire) -> VirtioNet:
    return VirtioNet(wire, A)


# Offloads from the driver


@pytest.mark.parametrize("six", [False, True])
async def test_segmentation_of_a_driver_goes_on_as_it_is(
    net: VirtioNet, wire: Wire, six: bool
) -> None:
    frame, at = tcp_frame(bytes(20000), six=six, to=B, by=A)
    async with rigged(net) as rig:
        rig.start()
        kind = Gso.TCP6 if six else Gso.TCP4
        await rig.request(1, offered(kind, 1448, at, frame))
        await rig.request(1, offered(kind | Gso.ECN, 1448, at, frame))
    want = (frame, NEEDS_CSUM | GSO, TCP6 if six else TCP4, 1448, at, 16)
    assert wire.frames == [want, (frame, want[1] | ECN, *want[2:])]


async def test_a_partial_checksum_goes_on_as_it_is(net: VirtioNet, wire: Wire) -> None:
    frame, at = tcp_frame(b"data", to=B, by=A)
    async with rigged(net) as rig:
        rig.start()
        await rig.request(1, HEADER.pack(1, 0, 0, 0, at, 16, 0) + frame)
    assert wire.frames == [(frame, NEEDS_CSUM, 0, 0, at, 16)]


@pytest.mark.parametrize(
    ("without", "header"),
    [
        (Feature.CSUM, HEADER.pack(1, 0, 0, 0, 34, 16, 0)),
        (Feature.HOST_TSO4, HEADER.pack(1, Gso.TCP4, 54, 1448, 34, 16, 0)),
        (Feature.HOST_ECN, HEADER.pack(1, Gso.TCP4 | Gso.ECN, 54, 1448, 34, 16, 0)),
        (Feature.HOST_USO, HEADER.pack(1, Gso.UDP_L4, 54, 1448, 34, 6, 0)),
        (None, HEADER.pack(0, Gso.TCP4, 54, 1448, 34, 16, 0)),
        (None, HEADER.pack(1, Gso.TCP4, 54, 0, 34, 16, 0)),
        (None, HEADER.pack(1, Gso.TCP6, 54, 1448, 34, 16, 0)),
        (None, HEADER.pack(1, 3, 54, 1448, 34, 16, 0)),
        (None, HEADER.pack(1, 77, 54, 1448, 34, 16, 0)),
        (None, HEADER.pack(1, 0, 0, 0, 65535, 16, 0)),
        (None, HEADER.pack(1, 0, 0, 0, 0, 0, 0)),
    ],
)
async def test_what_was_not_negotiated_or_is_a_lie_is_dropped_alone(
    net: VirtioNet, wire: Wire, without: Feature | None, header: bytes
) -> None:
    """A driver's header is hostile: the frames beside it still go."""
    drop = 0
    if without is not None:
        drop = bits(without)
        if without is Feature.CSUM:
            drop |= bits(11, 12, 13, Feature.HOST_USO)
    good = NONE + ether(b"good", to=B, by=A)
    frame, _ = tcp_frame(bytes(4000), to=B, by=A)
    async with rigged(net) as rig:
        rig.start(PLAIN | drop)
        # all three before the device looks, so they are one batch
        requests = [rig.add(1, each) for each in (good, header + frame, good)]
        for request in requests:
            await rig.done(1, request)
    assert [each[0] for each in wire.frames] == [ether(b"good", to=B, by=A)] * 2
    assert net.io_statistics().tx_errors == 1


@pytest.mark.parametrize(("size", "room"), [(5, 0), (25, 0), (70000, 0), (100, 8)])
async def test_lengths_no_frame_has_are_dropped(
    net: VirtioNet, wire: Wire, size: int, room: int
) -> None:
    async with rigged(net) as rig:
        rig.start()
        await rig.done(1, rig.add(1, bytes(size), room))
        assert net.io_statistics().tx_errors == 1
        assert Status.NEEDS_RESET not in net.status
    assert wire.frames == []


def udp_frame(payload: bytes, *, six: bool) -> tuple[bytes, int]:
    udp = struct.pack(">HHHH", 53, 5353, 8 + len(payload), 0) + payload
    packet = ip6(udp, protocol=17) if six else ip4(udp, protocol=17)
    header = MAC_B + MAC_A + struct.pack(">H", 0x86DD if six else 0x0800)
    return header + packet, 14 + len(packet) - len(udp)


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("length", [3000, 2000, 1000, 999, 1, 0])
async def test_udp_segmentation_is_done_here(
    net: VirtioNet, wire: Wire, six: bool, length: int
) -> None:
    payload = random.Random(length).randbytes(length)
    frame, at = udp_frame(payload, six=six)
    async with rigged(net) as rig:
        rig.start()
        header = HEADER.pack(1, Gso.UDP_L4, at + 8, 1000, at, 6, 0)
        await rig.request(1, header + frame)
    got = b""
    for number, (data, flags, _, _, start, offset) in enumerate(wire.frames):
        assert (flags, start, offset) == (NEEDS_CSUM, at, 6)
        packet, udp = data[14:], data[at:]
        got += udp[8:]
        assert struct.unpack_from(">H", udp, 4) == (len(udp),)
        assert udp[6:8] == struct.pack(">H", checksum(pseudo(packet, len(udp), 17)))
        if six:
            assert struct.unpack_from(">H", packet, 4) == (len(udp),)
        else:
            assert checksum(packet[:20]) == 0xFFFF
            assert struct.unpack_from(">HH", packet, 2) == (len(packet), 7 + number)
    assert got == payload
    assert len(wire.frames) == max(1, -(-length // 1000))


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        (udp_frame(bytes(100), six=False)[0], 0),
        (udp_frame(bytes(3000), six=False)[0], 1),
        (tcp_frame(bytes(100))[0], 50),
        (ether(bytes(100)), 50),
        (ether(b"\x44" + ip4(bytes(99), protocol=17)[1:], kind=0x0800), 50),
        *[(udp_frame(b"x", six=six)[0][:n], 50) for n in range(42) for six in (0, 1)],
    ],
)
def test_what_is_no_udp_cannot_be_cut(frame: bytes, size: int) -> None:
    with pytest.raises(InvalidError):
        segment(frame, size)


# Offloads to the driver


@pytest.mark.parametrize("six", [False, True])
async def test_a_driver_with_offloads_gets_frames_whole(
    net: VirtioNet, six: bool
) -> None:
    frame, at = tcp_frame(bytes(20000), six=six, to=A, by=B)
    kind = TCP6 if six else TCP4
    async with rigged(net) as rig:
        rig.start()
        post(rig, 30, 1500)
        deliver(net, (frame, NEEDS_CSUM | GSO | ECN, kind, 1448, at, 16))
        ((head, data),) = received(rig)
    assert data == frame
    wanted = (Gso.TCP6 if six else Gso.TCP4) | Gso.ECN
    assert HEADER.unpack(head)[:6] == (1, wanted, at + 20, 1448, at, 16)


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize(
    ("without", "checksums"),
    [
        ((Feature.GUEST_TSO4, Feature.GUEST_TSO6, Feature.GUEST_ECN), False),
        ((Feature.GUEST_CSUM, 7, 8, 9), True),
    ],
)
async def test_a_driver_without_offloads_gets_plain_frames(
    net: VirtioNet, six: bool, without: tuple[int, ...], checksums: bool
) -> None:
    frame, at = tcp_frame(random.Random(5).randbytes(5000), six=six, to=A, by=B)
    async with rigged(net) as rig:
        rig.start(PLAIN | bits(*without))
        post(rig, 10, 1526)
        deliver(net, (frame, NEEDS_CSUM | GSO, TCP6 if six else TCP4, 1448, at, 16))
        got = received(rig)
    oracle = segments(frame, at, 1448, six=six)
    if checksums:
        assert [data for _, data in got] == oracle
        assert all(head[0] == 0 for head, _ in got)
    else:
        cut = [data[: at + 16] + data[at + 18 :] for _, data in got]
        assert cut == [data[: at + 16] + data[at + 18 :] for data in oracle]
        assert all(HEADER.unpack(head)[4:6] == (at, 16) for head, _ in got)


async def test_a_driver_without_ecn_gets_no_segmentation_that_needs_it(
    net: VirtioNet,
) -> None:
    frame, at = tcp_frame(bytes(5000), to=A, by=B)
    async with rigged(net) as rig:
        rig.start(PLAIN | bits(Feature.GUEST_ECN))
        post(rig, 10, 6000)
        deliver(net, (frame, NEEDS_CSUM | GSO | ECN, TCP4, 1448, at, 16))
        assert len(received(rig)) == 4
        deliver(net, (frame, NEEDS_CSUM | GSO, TCP4, 1448, at, 16))
        assert len(received(rig)) == 1
