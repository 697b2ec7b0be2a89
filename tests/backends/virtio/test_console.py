"""virtio-console: ports, control messages, size, emergency write, and its channels."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from backends.virtio.channels import LogFile, Pty, UnixSocket
from backends.virtio.console import Event, Feature, Port, VirtioConsole
from backends.virtio.constants import Ring, Status, bits
from tests.backends.virtio.rig import Rig, rigged, settle
from vbus.errors import ExistsError, InvalidError

PLAIN = bits(Ring.PACKED)
MESSAGE = struct.Struct("<IHH")


class Wire:
    """A channel of the test's own."""

    def __init__(self) -> None:
        self.dropped = 0
        self.sent = b""
        self.closed = False
        self._in, self._out = trio.open_memory_channel[bytes](16)
        self.gate = trio.Event()
        self.gate.set()

    def type(self, data: bytes) -> None:
        self._in.send_nowait(data)

    async def receive(self) -> bytes:
        return await self._out.receive()

    async def send(self, data: bytes) -> None:
        await self.gate.wait()
        self.sent += data

    def send_now(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def wires() -> list[Wire]:
    return [Wire(), Wire()]


@pytest.fixture
def single(wires: list[Wire]) -> VirtioConsole:
    return VirtioConsole([Port(wires[0])], size=(132, 43))


@pytest.fixture
def double(wires: list[Wire]) -> VirtioConsole:
    ports = [Port(wires[0], console=True), Port(wires[1], name="org.vbus.agent")]
    return VirtioConsole(ports)


def say(rig: Rig, port: int, event: int, value: int) -> None:
    rig.add(3, MESSAGE.pack(port, event, value))


async def hear(rig: Rig) -> tuple[int, int, int, bytes]:
    data = await rig.request(2, room=64)
    return (*MESSAGE.unpack_from(data), data[8:])


# One port


async def test_one_port_carries_bytes_both_ways(
    single: VirtioConsole, wires: list[Wire]
) -> None:
    async with rigged(single) as rig:
        rig.start()
        assert len(single.queues) == 2
        await rig.request(1, b"login: ")
        assert wires[0].sent == b"login: "
        wires[0].type(b"root\n")
        assert await rig.request(0, room=100) == b"root\n"
        assert single.io_statistics().tx_bytes == 7
        assert single.io_statistics().rx_bytes == 5


async def test_input_that_does_not_fit_waits_for_the_next_buffer(
    single: VirtioConsole, wires: list[Wire]
) -> None:
    async with rigged(single) as rig:
        rig.start()
        wires[0].type(b"abcdefg")
        await settle()
        assert await rig.request(0, room=3) == b"abc"
        assert await rig.request(0, room=3) == b"def"
        assert await rig.request(0, room=3) == b"g"


async def test_a_large_output_crosses_whole(
    single: VirtioConsole, wires: list[Wire]
) -> None:
    data = os.urandom(200_000)
    async with rigged(single) as rig:
        rig.start()
        await rig.request(1, data)
    assert wires[0].sent == data


async def test_emergency_write_works_before_the_driver_is_there(
    single: VirtioConsole, wires: list[Wire]
) -> None:
    """R28: a driver writes the configuration before DRIVER_OK, too."""
    async with rigged(single) as rig:
        single.write_config(8, b"!\0\0\0")
        assert wires[0].sent == b"!"
        rig.start()
        single.write_config(8, b"?\0\0\0")
        assert wires[0].sent == b"!?"


async def test_the_size_is_configuration_and_changes_with_an_interrupt(
    single: VirtioConsole,
) -> None:
    """R28."""
    async with rigged(single) as rig:
        rig.start()
        assert struct.unpack("<HHI", single.read_config(0, 8)) == (132, 43, 1)
        single.resize(80, 24)
        assert struct.unpack("<HH", single.read_config(0, 4)) == (80, 24)
        assert rig.config_interrupts == 1


# Several ports


async def test_ports_are_added_introduced_and_opened(double: VirtioConsole) -> None:
    async with rigged(double) as rig:
        rig.start()
        say(rig, 0, Event.DEVICE_READY, 1)
        assert await hear(rig) == (0, Event.PORT_ADD, 1, b"")
        assert await hear(rig) == (1, Event.PORT_ADD, 1, b"")
        say(rig, 0, Event.PORT_READY, 1)
        assert await hear(rig) == (0, Event.CONSOLE_PORT, 1, b"")
        rows_columns = struct.pack("<HH", 25, 80)
        assert await hear(rig) == (0, Event.RESIZE, 1, rows_columns)
        assert await hear(rig) == (0, Event.PORT_OPEN, 1, b"")
        say(rig, 1, Event.PORT_READY, 1)
        assert await hear(rig) == (1, Event.PORT_NAME, 1, b"org.vbus.agent")
        assert await hear(rig) == (1, Event.PORT_OPEN, 1, b"")


async def test_a_port_gets_input_once_the_driver_opened_it(
    double: VirtioConsole, wires: list[Wire]
) -> None:
    async with rigged(double) as rig:
        rig.start()
        wires[1].type(b"hello")
        request = rig.add(4, room=16)
        await settle()
        assert not rig.collect(4)
        say(rig, 1, Event.PORT_OPEN, 1)
        assert await rig.done(4, request) == b"hello"
        await rig.request(5, b"hi")
        assert wires[1].sent == b"hi"
        assert wires[0].sent == b""


async def test_a_slow_port_does_not_hold_up_another(
    double: VirtioConsole, wires: list[Wire]
) -> None:
    async with rigged(double) as rig:
        rig.start()
        wires[0].gate = trio.Event()
        slow = rig.add(1, b"slow")
        await rig.request(5, b"fast")
        assert slow.written is None
        wires[0].gate.set()
        await rig.done(1, slow)
        assert wires[0].sent == b"slow"


async def test_a_driver_without_multiport_has_port_0_open(
    double: VirtioConsole, wires: list[Wire]
) -> None:
    async with rigged(double) as rig:
        rig.start(PLAIN | bits(Feature.MULTIPORT))
        wires[0].type(b"x")
        assert await rig.request(0, room=4) == b"x"
        rig.add(3, MESSAGE.pack(0, Event.DEVICE_READY, 1))
        await settle()
        assert not rig.collect(3)


async def test_a_reset_forgets_what_was_open_and_unsaid(
    double: VirtioConsole, wires: list[Wire]
) -> None:
    async with rigged(double) as rig:
        rig.start()
        double.resize(100, 40)
        say(rig, 1, Event.PORT_OPEN, 1)
        await settle()
        rig.start()
        wires[1].type(b"x")
        rig.add(4, room=4)
        answer = rig.add(2, room=64)
        await settle()
        assert not rig.collect(4)
        assert not rig.collect(2)
        say(rig, 0, Event.DEVICE_READY, 1)
        assert MESSAGE.unpack(await rig.done(2, answer)) == (0, Event.PORT_ADD, 1)


async def test_messages_that_name_nothing_are_counted_and_harmless(
    double: VirtioConsole,
) -> None:
    async with rigged(double) as rig:
        rig.start()
        say(rig, 2, Event.PORT_OPEN, 1)
        say(rig, 1 << 31, Event.PORT_READY, 1)
        say(rig, 0, 77, 1)
        await settle()
        assert double.io_statistics().bad_messages == 3
        assert Status.NEEDS_RESET not in double.status


async def test_a_driver_that_asks_and_does_not_listen_fills_no_memory(
    double: VirtioConsole,
) -> None:
    async with rigged(double) as rig:
        rig.start()
        for _ in range(500):
            await rig.request(3, MESSAGE.pack(0, Event.DEVICE_READY, 1))
        assert len(double._outbox) <= 80


@pytest.mark.parametrize(
    ("queue", "out", "room"), [(3, b"short", 0), (0, b"x", 0), (2, b"x", 4)]
)
async def test_malformed_chains_need_a_reset(
    double: VirtioConsole, wires: list[Wire], queue: int, out: bytes, room: int
) -> None:
    async with rigged(double) as rig:
        rig.start()
        say(rig, 0, Event.DEVICE_READY, 1)
        say(rig, 0, Event.PORT_OPEN, 1)
        wires[0].type(b"x")
        rig.add(queue, out, room)
        await settle()
        assert Status.NEEDS_RESET in double.status


def test_a_console_has_ports() -> None:
    for count in (0, 32):
        with pytest.raises(InvalidError):
            VirtioConsole([Port(Wire()) for _ in range(count)])


# Channels


@pytest.fixture
def pty() -> Iterator[Pty]:
    pty = Pty()
    yield pty
    pty.close()


async def test_a_pty_is_a_terminal_for_who_opens_it(pty: Pty) -> None:
    async with rigged(VirtioConsole([Port(pty)])) as rig:
        rig.start()
        await rig.request(1, b"nobody sees this")
        assert pty.dropped == 16
        terminal = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
        try:
            await rig.request(1, b"prompt\r\n")
            assert os.read(terminal, 100) == b"prompt\r\n"
            os.write(terminal, b"ls\n\x03")
            assert await rig.request(0, room=16) == b"ls\n\x03"
            pty.send_now(b"!")
            assert os.read(terminal, 1) == b"!"
        finally:
            os.close(terminal)
        await rig.request(1, b"gone")
        assert pty.dropped == 20


async def test_a_reader_who_leaves_a_full_pty_frees_the_driver(pty: Pty) -> None:
    async with rigged(VirtioConsole([Port(pty)])) as rig:
        rig.start()
        terminal = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
        blocked = rig.add(1, bytes(200_000))
        await settle()
        assert not rig.collect(1)
        os.close(terminal)
        await rig.done(1, blocked)
        assert pty.dropped > 0


async def test_a_unix_socket_serves_one_client_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "console.sock"
    channel = UnixSocket(path)
    with pytest.raises(ExistsError):
        UnixSocket(path)
    async with rigged(VirtioConsole([Port(channel)])) as rig:
        rig.start()
        await rig.request(1, b"unseen")
        assert channel.dropped == 6
        for word in (b"one", b"two"):
            async with await trio.open_unix_socket(path) as client:
                await settle()
                await rig.request(1, b"hello " + word)
                assert await client.receive_some(64) == b"hello " + word
                await client.send_all(word)
                assert await rig.request(0, room=16) == word
            await settle()
    channel.close()
    assert not path.exists()


async def test_a_log_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"before\n")
    log = LogFile(path)
    async with rigged(VirtioConsole([Port(log)])) as rig:
        rig.start()
        await rig.request(1, b"boot\n")
        rig.device.write_config(8, b"!\0\0\0")
    log.close()
    assert path.read_bytes() == b"before\nboot\n!"
    with pytest.raises(InvalidError):
        LogFile(tmp_path)


async def test_a_full_disk_does_not_stop_the_guest() -> None:
    log = LogFile(Path("/dev/full"))
    async with rigged(VirtioConsole([Port(log)])) as rig:
        rig.start()
        await rig.request(1, b"lost")
        assert log.dropped == 4
    log.close()
