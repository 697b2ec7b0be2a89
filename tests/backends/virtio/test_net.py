"""virtio-net: frames, mergeable buffers, control, multi-queue, ports."""

import random
import struct

import pytest
import trio

from backends.venet.switch import Port, Switch
from backends.virtio.constants import Status, bits
from backends.virtio.net import VirtioNet
from backends.virtio.netheader import Feature, Gso
from backends.virtio.netport import SwitchPort, TapPort
from tests.backends.virtio.net_rig import (
    ANNOUNCE,
    ERR,
    MAC,
    MQ,
    NONE,
    OK,
    PLAIN,
    RX,
    VLAN,
    A,
    B,
    C,
    Wire,
    control,
    deliver,
    offered,
    post,
    received,
)
from tests.backends.virtio.rig import rigged, settle
from tests.frames import (
    BROADCAST,
    MAC_A,
    MAC_B,
    ether,
    tcp_frame,
)
from tests.netns import isolated
from vbus.errors import InvalidError, NotFoundError
from vbus.net import FrameBatch, Tap


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def net(wire: Wire) -> VirtioNet:
    return VirtioNet(wire, A)


# Plain frames


@pytest.mark.parametrize("without", [0, PLAIN, PLAIN | bits(Feature.MRG_RXBUF)])
async def test_frames_cross_both_ways(net: VirtioNet, wire: Wire, without: int) -> None:
    async with rigged(net) as rig:
        rig.start(without)
        frames = [ether(b"%03d" % n * 40, to=B, by=A) for n in range(200)]
        for frame in frames:
            await rig.request(1, NONE + frame)
        assert [each[0] for each in wire.frames] == frames
        post(rig, 50, 1526)
        deliver(net, *[ether(b"%d" % n, to=A, by=B) for n in range(50)])
        got = received(rig)
        assert [f for _, f in got] == [ether(b"%d" % n, to=A, by=B) for n in range(50)]
        assert all(head == NONE[:10] + b"\1\0" for head, _ in got)
        assert rig.interrupts.count(0) == 1
        assert net.io_statistics().tx_frames == 200
        assert net.io_statistics().rx_frames == 50


async def test_a_legacy_header_has_ten_bytes(net: VirtioNet, wire: Wire) -> None:
    """R20."""
    async with rigged(net) as rig:
        rig.start(PLAIN | bits(Feature.MRG_RXBUF), legacy=True)
        frame = ether(b"legacy", to=B, by=A)
        await rig.request(1, bytes(10) + frame)
        assert wire.frames[0][0] == frame
        post(rig, 1, 1526)
        deliver(net, ether(b"in", to=A, by=B))
        assert received(rig, size=10) == [(bytes(10), ether(b"in", to=A, by=B))]


async def test_no_buffer_drops_and_nothing_waits(net: VirtioNet) -> None:
    async with rigged(net) as rig:
        rig.start()
        deliver(net, ether(b"x", to=A, by=B))
        post(rig, 1, 1526)
        deliver(net, ether(b"y", to=A, by=B), ether(b"z", to=A, by=B))
        assert [frame for _, frame in received(rig)] == [ether(b"y", to=A, by=B)]
        assert net.io_statistics().rx_dropped == 2
    deliver(net, ether(b"nobody", to=A, by=B))
    assert net.io_statistics().rx_dropped == 3


async def test_a_link_that_is_down_delivers_nothing(net: VirtioNet) -> None:
    """R28: status is the device's to change."""
    async with rigged(net) as rig:
        rig.start()
        post(rig, 4, 1526)
        net.set_link(False)
        assert (net.read_config(6, 2), rig.config_interrupts) == (b"\0\0", 1)
        deliver(net, ether(b"x", to=A, by=B))
        assert received(rig) == []
        net.set_link(True)
        deliver(net, ether(b"x", to=A, by=B))
        assert len(received(rig)) == 1


# Mergeable buffers


async def test_a_long_frame_is_spread_over_mergeable_buffers(net: VirtioNet) -> None:
    async with rigged(net) as rig:
        rig.start()
        frame = ether(random.Random(3).randbytes(8000), to=A, by=B)
        post(rig, 10, 1000)
        deliver(net, frame)
        ((head, data),) = received(rig)
        assert data == frame
        assert struct.unpack_from("<H", head, 10) == (9,)


async def test_too_few_mergeable_buffers_are_kept_for_the_next_frame(
    net: VirtioNet,
) -> None:
    async with rigged(net) as rig:
        rig.start()
        post(rig, 3, 100)
        deliver(net, ether(bytes(1000), to=A, by=B), ether(b"fits", to=A, by=B))
        assert [frame for _, frame in received(rig)] == [ether(b"fits", to=A, by=B)]
        post(rig, 9, 100)
        deliver(net, ether(bytes(1000), to=A, by=B))
        assert [frame for _, frame in received(rig)] == [ether(bytes(1000), to=A, by=B)]


async def test_without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped(
    net: VirtioNet,
) -> None:
    async with rigged(net) as rig:
        rig.start(PLAIN | bits(Feature.MRG_RXBUF))
        post(rig, 3, 100)
        deliver(net, ether(bytes(200), to=A, by=B), ether(b"fits", to=A, by=B))
        assert [frame for _, frame in received(rig)] == [ether(b"fits", to=A, by=B)]
        assert net.io_statistics().rx_length_errors == 1


@pytest.mark.parametrize(("out", "room"), [(b"x", 1526), (b"", 11)])
async def test_a_receive_buffer_of_the_wrong_kind_needs_a_reset(
    net: VirtioNet, out: bytes, room: int
) -> None:
    async with rigged(net) as rig:
        rig.start()
        rig.add(0, out, room)
        deliver(net, ether(b"x", to=A, by=B))
        assert Status.NEEDS_RESET in net.status
        deliver(net, ether(b"x", to=A, by=B))
        rig.start()
        post(rig, 1, 1526)
        deliver(net, ether(b"x", to=A, by=B))
        assert len(received(rig)) == 1


async def test_a_reset_forgets_taken_buffers(net: VirtioNet) -> None:
    async with rigged(net) as rig:
        rig.start()
        post(rig, 20, 1526)
        deliver(net, ether(b"x", to=A, by=B))
        rig.start()
        deliver(net, ether(b"x", to=A, by=B))
        assert net.io_statistics().rx_dropped == 1
        post(rig, 1, 1526)
        deliver(net, ether(b"y", to=A, by=B))
        assert [frame for _, frame in received(rig)] == [ether(b"y", to=A, by=B)]


# The control queue


def table(*macs: bytes) -> bytes:
    return struct.pack("<I", len(macs)) + b"".join(macs)


async def test_modes_and_table_filter_what_is_received(net: VirtioNet) -> None:
    group, other = bytes.fromhex("01005e000001"), bytes(C)
    async with rigged(net) as rig:
        rig.start()

        async def arrives(destination: bytes) -> bool:
            post(rig, 1, 1526)
            deliver(net, ether(b"x", to=destination, by=B))
            return bool(received(rig))

        assert await arrives(other)
        assert await control(rig, RX, 0, b"\0") == OK
        assert [await arrives(to) for to in (A, BROADCAST, other, group)] == [
            True, True, False, False,
        ]  # fmt: skip
        assert await control(rig, MAC, 0, table(other) + table(group)) == OK
        assert [await arrives(other), await arrives(group)] == [True, True]
        assert await control(rig, MAC, 0, table() + table()) == OK
        for mode, to, wanted in [
            (1, group, True), (2, other, True), (5, BROADCAST, False),
            (3, group, False), (4, A, False),
        ]:  # fmt: skip
            assert await control(rig, RX, mode, b"\1") == OK
            assert await arrives(to) is wanted
        rig.start()
        assert await arrives(other)


async def test_the_address_is_set_through_the_control_queue(
    net: VirtioNet, wire: Wire
) -> None:
    """R25: the way that virtio kept."""
    async with rigged(net) as rig:
        rig.start()
        wire.taken.add(bytes(B))
        assert await control(rig, MAC, 1, bytes(C)) == OK
        assert net.read_config(0, 6) == bytes(C)
        assert wire.macs == [C]
        for bad in (bytes(B), bytes(6), BROADCAST, bytes(5), bytes(7)):
            assert await control(rig, MAC, 1, bad) == ERR
        assert net.mac == C
        net.write_config(0, bytes(B))
        assert net.read_config(0, 6) == bytes(C)  # the field is read-only here
    assert net.mac == A
    assert wire.macs == [C, A]


async def test_a_legacy_driver_writes_its_address_byte_by_byte(
    net: VirtioNet, wire: Wire
) -> None:
    """R25, R28."""
    async with rigged(net) as rig:
        rig.start(PLAIN | bits(Feature.CTRL_MAC_ADDR), legacy=True)
        for at, byte in enumerate(bytes.fromhex("0e1122334455")):
            net.write_config(at, bytes([byte]))
        assert str(net.mac) == "0e:11:22:33:44:55"


async def test_the_latch_sets_the_whole_address_at_once(wire: Wire) -> None:
    """R25."""
    net = VirtioNet(wire, A, latch=True)
    async with rigged(net) as rig:
        rig.start()
        net.write_config(1, b"\x11")
        net.write_config(3, b"\x33")
        assert net.mac == A
        net.commit_config()
        assert str(net.mac) == "02:11:00:33:00:0a"
        assert [str(mac) for mac in wire.macs] == ["02:11:00:33:00:0a"]


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (RX, 6, b"\1"), (RX, 0, b""), (RX, 0, b"\2"), (RX, 0, b"\1\1"),
        (MAC, 0, b""), (MAC, 0, table()), (MAC, 0, table(BROADCAST) + table()),
        (MAC, 0, table() + table(MAC_B)), (MAC, 0, table() * 3),
        (MAC, 0, struct.pack("<I", 1 << 31) + table()), (MAC, 2, b""),
        (VLAN, 0, b"\5\0"), (VLAN, 1, b"\5\0"), (ANNOUNCE, 0, b""),
        (MQ, 0, b"\2\0"), (MQ, 0, b"\1\0"), (MQ, 1, b""), (9, 9, b""),
    ],
)  # fmt: skip
async def test_a_bad_command_is_refused_and_changes_nothing(
    net: VirtioNet, kind: int, command: int, data: bytes
) -> None:
    async with rigged(net) as rig:
        rig.start()
        before = (dict(net.filter.modes), net.filter.stations, net.filter.groups)
        assert await control(rig, kind, command, data) == ERR
        assert (net.filter.modes, net.filter.stations, net.filter.groups) == before
        assert Status.NEEDS_RESET not in net.status
        assert net.io_statistics().refused_commands == 1


async def test_vlan_filters_are_not_offered(net: VirtioNet) -> None:
    assert not net.offered >> 19 & 1


async def test_a_command_without_room_for_the_answer_needs_a_reset(
    net: VirtioNet,
) -> None:
    async with rigged(net) as rig:
        rig.start()
        rig.add(2, b"\0\0\1")
        await settle()
        assert Status.NEEDS_RESET in net.status


@pytest.mark.parametrize(
    ("without", "bit"),
    [(Feature.CSUM, 11), (Feature.GUEST_CSUM, 7), (Feature.CTRL_VQ, 18)],
)
async def test_features_without_what_they_need_are_refused(
    net: VirtioNet, without: Feature, bit: int
) -> None:
    async with rigged(net) as rig:
        assert not rig.negotiate(bits(without)) & Status.FEATURES_OK
        assert f"feature {bit} " in str(net.statistics().refusal)


# Multi-queue


async def test_pairs_are_used_as_the_driver_says_and_flows_stay_together(
    wire: Wire,
) -> None:
    net = VirtioNet(wire, A, pairs=4)
    assert net.read_config(8, 2) == b"\4\0"
    flows = [tcp_frame(b"x" * n, to=A, by=B)[0] for n in range(1, 40)]
    async with rigged(net) as rig:
        rig.start()
        for queue in (0, 2, 4, 6):
            post(rig, 100, 1526, queue)
        deliver(net, *flows)
        assert len(received(rig, 0)) == len(flows)
        for bad in (b"\0\0", b"\5\0", b"\1"):
            assert await control(rig, MQ, 0, bad) == ERR
        assert await control(rig, MQ, 0, b"\4\0") == OK
        deliver(net, *flows)
        deliver(net, *flows)
        seen = [[f for _, f in received(rig, queue)] for queue in (0, 2, 4, 6)]
        assert sum(map(len, seen)) == 2 * len(flows)
        assert all(len(each) for each in seen)
        assert all(each.count(frame) == 2 for each in seen for frame in each)
        for queue in (1, 3, 5, 7):
            await rig.request(queue, NONE + ether(b"%d" % queue, to=B, by=A))
        rig.start()
        post(rig, 100, 1526)
        deliver(net, *flows)
        assert len(received(rig, 0)) == len(flows)  # one pair again
    assert len(wire.frames) == 4


async def test_without_mq_the_control_queue_is_the_third(wire: Wire) -> None:
    """5.1.2."""
    net = VirtioNet(wire, A, pairs=4)
    async with rigged(net) as rig:
        rig.start(PLAIN | bits(Feature.MQ))
        assert await rig.request(2, bytes([RX, 0, 0]), 1) == OK
        assert not net.filter.modes["promisc"]


@pytest.mark.parametrize("values", [{"pairs": 0}, {"pairs": 17}, {"mtu": 67}])
def test_impossible_cards_are_refused(wire: Wire, values: dict[str, int]) -> None:
    with pytest.raises(InvalidError):
        VirtioNet(wire, A, **values)


def test_without_offload_nothing_that_needs_it_is_offered(wire: Wire) -> None:
    net = VirtioNet(wire, A, offload=False)
    assert not net.offered & bits(0, 1, 7, 8, 9, 11, 12, 13, Feature.HOST_USO)
    assert net.read_config(10, 2) == struct.pack("<H", 1500)


# Switch and TAP


class NoHost:
    def device(self, name: str) -> Switch:
        raise NotFoundError(name)


class Recorder(Port):
    def __init__(self) -> None:
        super().__init__("recorder")
        self.frames: list[bytes] = []

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        self.frames += [batch.frame(n)[0] for n in range(first, first + count)]


async def test_two_devices_talk_over_the_switch_of_venet() -> None:
    """R15."""
    switch = Switch("lan0", NoHost())
    ports = [SwitchPort(name, switch) for name in "ab"]
    nets = [VirtioNet(port, mac) for port, mac in zip(ports, (A, B), strict=True)]
    for port, net in zip(ports, nets, strict=True):
        port.plug(net)
    other = Recorder()
    switch.attach(other)
    async with rigged(nets[0]) as left, rigged(nets[1]) as right:
        left.start()
        right.start(PLAIN | bits(7, 8, 9))
        post(right, 20, 1526)
        frame, at = tcp_frame(bytes(4000), to=B, by=A)
        await left.request(1, offered(Gso.TCP4, 1448, at, frame))
        assert len(received(right)) == 3
        assert other.frames == []
        assert await control(left, MAC, 1, bytes(B)) == ERR  # it is the other's
        assert await control(left, MAC, 1, bytes(C)) == OK
        await right.request(1, NONE + ether(b"to C", to=C, by=B))
        assert net.io_statistics().tx_frames == 1
        assert nets[0].io_statistics().rx_dropped == 1  # it reached the other
        ports[0].unplug()
        await right.request(1, NONE + ether(b"gone", to=C, by=B))
        assert other.frames == [ether(b"gone", to=C, by=B)]


@isolated
async def test_the_hosts_kernel_answers_over_a_tap() -> None:
    """R15: an ARP request through a real TAP."""
    import ipaddress
    import socket

    with Tap("host0") as tap:
        tap.configure(address=ipaddress.IPv4Interface("10.9.0.1/24"), up=True)
        port = TapPort(tap)
        net = VirtioNet(port, A)
        port.plug(net)
        ask = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC_A
        ask += socket.inet_aton("10.9.0.2") + bytes(6) + socket.inet_aton("10.9.0.1")
        async with rigged(net) as rig, trio.open_nursery() as nursery:
            nursery.start_soon(port.run)
            rig.start()
            buffers = post(rig, 64, 1526)
            await rig.request(1, NONE + ether(ask, to=BROADCAST, by=A, kind=0x0806))
            with trio.fail_after(5):
                for buffer in buffers:
                    answer = (await rig.done(0, buffer))[12:]
                    if answer[12:14] == b"\x08\x06" and answer[20:22] == b"\0\2":
                        break
            assert answer[28:32] == socket.inet_aton("10.9.0.1")
            nursery.cancel_scope.cancel()
