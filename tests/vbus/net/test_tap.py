"""TAP devices of a real kernel, in network namespaces of the tests' own."""

import os
import socket
import struct

import pytest
import trio
import trio.testing

from ioq import RingConsumer
from tests.frames import GSO, NEEDS_CSUM, checksum, ether, ip4
from tests.netns import Netns, carrier_becomes, isolated
from tests.vbus.net.pair import Format, Pair
from vbus.errors import InvalidError
from vbus.net import FrameBatch, MacAddress, Tap, interface
from vbus.net.interface import check_name, parse_address

HOST, GUEST = "10.9.0.1", "10.9.0.2"


def names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


async def collected(tap: Tap, batch: FrameBatch) -> None:
    """Wait for frames."""
    while not tap.end.collect(batch):
        await tap.wait()


@isolated
def test_a_tap_is_configured_and_gone_when_closed() -> None:
    """R15: name, address, MTU, state, without any tool."""
    mac = MacAddress.parse("02:00:00:00:00:42")
    with Tap("port%d") as tap:
        assert tap.name == "port0"
        tap.configure(mac=mac, mtu=1400, address=parse_address("10.9.0.1/24"), up=True)
        assert tap.mac == mac
        assert interface.get_mtu(tap.name) == 1400
        assert interface.is_up(tap.name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((HOST, 0))
        tap.configure(up=False)
        assert not interface.is_up(tap.name)
        with pytest.raises(OSError, match="busy"):
            Tap("port0")
    assert names() == {"lo"}
    tap.close()


@isolated
async def test_the_carrier_is_what_was_set() -> None:
    """R15 (7.9): link state reaches the kernel's interface."""
    with Tap("port0") as tap:
        tap.configure(up=True)
        for on in (False, True, False):
            tap.set_carrier(on)
            await carrier_becomes("port0", on)


@isolated
def test_nothing_is_left_open_by_many_taps() -> None:
    """R15: fds and interfaces are what they were, refusals included."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with Tap("port0"), pytest.raises(OSError, match="busy"):
            Tap("port0")
    assert len(os.listdir("/proc/self/fd")) == before
    assert names() == {"lo"}


@isolated
async def test_frames_cross_to_and_from_the_kernel() -> None:
    """R15: the kernel answers an ARP request that a batch delivered."""
    with Tap("port0") as tap:
        tap.configure(address=parse_address("10.9.0.1/24"), up=True)
        mac = bytes.fromhex("020000000099")
        ask = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + mac
        ask += socket.inet_aton(GUEST) + bytes(6) + socket.inet_aton(HOST)
        batch = FrameBatch()
        batch.load([(ether(ask, to=b"\xff" * 6, by=mac, kind=0x0806), 0, 0, 0, 0, 0)])
        tap.end.deliver(batch, 0, 1)
        with trio.fail_after(5):
            while True:
                await collected(tap, batch)
                frames = [batch.frame(n)[0] for n in range(len(batch))]
                answers = [frame for frame in frames if frame[12:14] == b"\x08\x06"]
                if answers:
                    break
        assert answers[0][:6] == mac
        assert answers[0][6:12] == tap.mac
        assert answers[0][20:22] == b"\0\2"
        assert tap.statistics().out_frames == 1


@isolated
async def test_bulk_tcp_comes_out_unsegmented_and_a_checksum_is_left_to_us() -> None:
    """R15: frames of many segments with their offload fields."""
    pair = Pair(Format(count=64, arena=1 << 20, pages=256))
    with Linked(pair) as linked:
        sizes: list[int] = []
        seen: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            linked.start(nursery, watch=lambda f: seen.append((f[1], len(f[0]))))
            sent = bytes(range(256)) * 40000
            got = await linked.transfer(sent, GUEST)
            assert got == sent
            sizes = [size for flags, size in seen if flags & GSO]
            nursery.cancel_scope.cancel()
        assert max(sizes) > 20000
        assert any(flags & NEEDS_CSUM for flags, _ in seen)


@pytest.mark.parametrize(
    "form",
    [
        Format(sg=sg, pmtd=sg, txc=txc, l4ro=l4ro, count=64, arena=1 << 20, pages=128)
        for sg, txc, l4ro in (
            (False, False, False),
            (True, False, False),
            (False, True, True),
            (True, True, True),
        )
    ],
    ids=["flat", "sg-to-flat", "flat-to-l4ro", "all"],
)
@isolated
async def test_tcp_between_two_kernels_both_ways_in_every_format(form: Format) -> None:
    """R15: software segmentation and checksums are right: the kernels accept them."""
    pair = Pair(form)
    data = os.urandom(1 << 20)
    with Linked(pair) as linked:
        async with trio.open_nursery() as nursery:
            linked.start(nursery)
            assert await linked.transfer(data, GUEST) == data
            assert await linked.transfer(data, HOST) == data
            nursery.cancel_scope.cancel()
        assert pair.pump.statistics().rx_errors == 0
        assert pair.host._counters()[2:4] == (0, 0)


class Linked:
    """A Pair with a TAP at each end, in two namespaces: 10.9.0.1 and 10.9.0.2."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.inside = Netns()
        self.host_tap = Tap("host0")
        self.host_tap.configure(address=parse_address(f"{HOST}/24"), up=True)
        with self.inside:
            self.guest_tap = Tap("guest0", offload=pair.form.sg)
            self.guest_tap.configure(address=parse_address(f"{GUEST}/24"), up=True)

    def start(self, nursery: trio.Nursery, watch: object = None) -> None:
        nursery.start_soon(self.pair.pump.run, self.guest_tap)
        nursery.start_soon(self._down, watch)
        nursery.start_soon(self._up)

    async def _down(self, watch: object) -> None:
        batch, host = FrameBatch(), self.pair.host
        while True:
            await collected(self.host_tap, batch)
            if callable(watch):
                for n in range(len(batch)):
                    watch(batch.frame(n))
            host.deliver(batch, 0, len(batch))
            self.pair.ring_guest(host.signal_rx())

    async def _up(self) -> None:
        batch, host = FrameBatch(), self.pair.host
        tx = RingConsumer(self.pair.host_rings["tx"], self.pair.to_host["tx"])
        while True:
            await tx.wait()
            if host.collect(batch):
                self.host_tap.end.deliver(batch, 0, len(batch))
                self.pair.ring_guest(host.release())
            if host.pending:
                self.pair.ring_guest(host.flush_events())

    async def transfer(self, data: bytes, to: str) -> bytes:
        """Send bytes by TCP to that address from the other side."""
        with trio.fail_after(20):
            return await self._transfer(data, to)

    async def _transfer(self, data: bytes, to: str) -> bytes:
        stream = socket.SOCK_STREAM
        outside = socket.socket(socket.AF_INET, stream)
        inside = self.inside.socket(stream)
        server, client = (inside, outside) if to == GUEST else (outside, inside)
        listener = trio.socket.from_stdlib_socket(server)
        await listener.bind((to, 0))
        listener.listen()
        caller = trio.SocketStream(trio.socket.from_stdlib_socket(client))
        received = bytearray()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await caller.socket.connect((to, listener.getsockname()[1]))
                await caller.send_all(data)
                await caller.send_eof()

            nursery.start_soon(send)
            accepted, _ = await listener.accept()
            while chunk := await accepted.recv(1 << 18):
                received += chunk
        for each in (accepted, listener, caller.socket):
            each.close()
        return bytes(received)

    def __enter__(self) -> "Linked":
        return self

    def __exit__(self, *_: object) -> None:
        self.host_tap.close()
        self.guest_tap.close()
        self.pair.close()


@isolated
async def test_closing_wakes_who_waits() -> None:
    """A task in wait() gets ClosedResourceError."""
    tap = Tap("port0")
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await tap.wait()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        tap.close()
    with pytest.raises(trio.ClosedResourceError):
        await tap.wait()


@isolated
def test_a_frame_for_an_interface_that_is_down_is_counted() -> None:
    """R15: nobody waits for it."""
    with Tap("port0") as tap:
        batch = FrameBatch()
        batch.load([(ether(ip4(b"", protocol=17)), 0, 0, 0, 0, 0)])
        tap.end.deliver(batch, 0, 1)
        assert tap.statistics().out_errors == 1


@pytest.mark.parametrize(
    "name", ["", "a/b", "much-too-long-for-it", "a b", "tap%d", ".."]
)
def test_names_no_interface_can_have_are_refused(name: str) -> None:
    """With InvalidError, before the kernel is asked."""
    with pytest.raises(InvalidError):
        check_name(name)


@pytest.mark.parametrize("text", ["10.0.0", "10.0.0.1/33", "fe80::1/64", "x"])
def test_addresses_that_are_none_are_refused(text: str) -> None:
    """With InvalidError that shows the text."""
    with pytest.raises(InvalidError, match=text.split("/")[0]):
        parse_address(text)


def test_the_oracle_knows_its_checksum() -> None:
    """RFC 1071's own example."""
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
