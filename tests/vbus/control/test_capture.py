"""What a capture holds for its reader: bounded, and nothing is uncounted."""

from pathlib import Path

import pytest

from backends.venet import Switch
from backends.venet.switch import Port
from tests import frames, pcapng
from vbus import pcapng as writing
from vbus.bus import BusModel
from vbus.cli.capture import Blocks
from vbus.config import Config
from vbus.control.capture import Capture
from vbus.daemon import Daemon
from vbus.net import FrameBatch


class Sink(Port):
    """A port that loses everything."""

    def deliver(self, batch: FrameBatch, first: int, count: int) -> None:
        pass


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon(Config(), tmp_path, BusModel({"switch": Switch}))


@pytest.fixture
def switch(daemon: Daemon) -> Switch:
    switch = daemon.model.add_device("lan0", "switch")
    assert isinstance(switch, Switch)
    return switch


def batch_of(*loaded: tuple[bytes, int, int, int, int, int]) -> FrameBatch:
    batch = FrameBatch()
    batch.load(loaded)
    return batch


PLAIN = (frames.ether(b"x" * 100), 0, 0, 0, 0, 0)


async def test_frames_are_shown_as_they_are_on_the_bus(
    daemon: Daemon, switch: Switch
) -> None:
    """Segmentation and checksum still to be done are said in the comment."""
    frame, at = frames.tcp_frame(b"y" * 20_000)
    large = (frame, frames.NEEDS_CSUM | frames.GSO, frames.TCP4, 1448, at, 16)
    with Capture(daemon, switch, 64) as capture:
        switch.forward(Sink("p1"), batch_of(PLAIN, large))
        event = await capture.next()
    assert not switch.frames
    blocks = Blocks("lan0", 64)
    data = b"".join([blocks.begin("switch"), *blocks.take(event), blocks.end()])
    assert [one.received for one in pcapng.read(data).interfaces] == [0, 2]
    first, second = pcapng.read(data).packets
    assert (first.data, first.length, first.comment) == (PLAIN[0][:64], 114, "")
    assert (second.data, second.length) == (frame[:64], len(frame))
    assert "TCP/IPv4 segments of 1448 bytes" in second.comment
    assert "checksum to be filled in" in second.comment


async def test_what_does_not_fit_is_counted_by_port_and_told_in_its_place(
    daemon: Daemon, switch: Switch
) -> None:
    one, two = Sink("p1"), Sink("p2")
    with Capture(daemon, switch, 1000, limit=1000) as capture:
        for _ in range(10):
            switch.forward(one, batch_of(PLAIN, PLAIN))
        switch.forward(two, batch_of(PLAIN))
        event = await capture.next()
        taken = event["frames"]
        assert isinstance(taken, list)
        assert 0 < len(taken) < 20
        assert event["dropped"] == {"p1": 20 - len(taken), "p2": 1}
        switch.forward(one, batch_of(PLAIN))
        event = await capture.next()
        assert event["dropped"] == {}


async def test_losses_alone_are_told_too(daemon: Daemon, switch: Switch) -> None:
    with Capture(daemon, switch, 1000, limit=0) as capture:
        switch.forward(Sink("p1"), batch_of(PLAIN))
        assert await capture.next() == {"frames": [], "dropped": {"p1": 1}}


async def test_it_ends_when_the_device_goes(daemon: Daemon, switch: Switch) -> None:
    with Capture(daemon, switch, 1000) as capture:
        switch.forward(Sink("p1"), batch_of(PLAIN))
        daemon._tell({"event": "device-removed", "device": "other"})
        daemon._tell({"event": "device-removed", "device": "lan0"})
        assert "frames" in await capture.next()
        assert await capture.next() == {"end": "lan0 was removed"}


def test_blocks_are_padded_and_options_end() -> None:
    for size in range(5):
        data = (
            writing.section("x" * size)
            + writing.interface("é" * size, "", 9)
            + writing.packet(0, 2**40 + 7, b"d" * size, 1000, direction=2, dropped=3)
            + writing.packet(0, 1, b"", 0)
            + writing.statistics(0, 5, 6, 7)
        )
        found = pcapng.read(data)
        assert found.interfaces == [pcapng.Interface("é" * size, "", 9, 6, 7)]
        first, second = found.packets
        assert (first.data, first.length, first.time_ns) == (
            b"d" * size,
            1000,
            2**40 + 7,
        )
        assert (first.direction, first.dropped, first.comment) == (2, 3, "")
        assert (second.direction, second.dropped) == (0, 0)
