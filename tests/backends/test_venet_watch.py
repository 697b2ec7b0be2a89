"""Looking at frames: each kind of device shows what crosses it, both ways."""

from backends.venet import Switch, SwitchTap, Venet
from tests.backends.stage import staged
from tests.backends.test_venet_tap import SWITCHED, answer, arp_request
from tests.netns import isolated
from vbus.net import Direction, FrameBatch

Seen = list[tuple[str, Direction, bytes]]


def watching(device: Switch | SwitchTap | Venet) -> Seen:
    """Collect the ARP packets: port, direction, and whether request or reply."""
    seen: Seen = []

    def see(
        port: str, direction: Direction, batch: FrameBatch, first: int, count: int
    ) -> None:
        for index in range(first, first + count):
            data, _, *_ = batch.snap(index, 22)
            if data[12:14] == b"\x08\x06":
                seen.append((port, direction, data[20:22]))

    device.frames.add(see)
    return seen


@isolated
async def test_a_request_and_its_reply_are_seen_at_every_device() -> None:
    async with staged(SWITCHED) as stage:
        devices = [stage.device(name) for name in ("port0", "lan0", "up0")]
        port, switch, uplink = devices
        assert isinstance(port, Venet)
        assert isinstance(switch, Switch)
        assert isinstance(uplink, SwitchTap)
        at_port, at_switch, at_uplink = map(watching, (port, switch, uplink))
        driver = await stage.driver(0)
        driver.send(arp_request(driver.mac))
        await stage.settle()
        await answer(stage, driver)
    request, reply = b"\0\1", b"\0\2"
    ours, theirs = ("port0", Direction.IN), ("up0", Direction.IN)
    assert at_port == [(*ours, request), ("port0", Direction.OUT, reply)]
    assert at_switch == [(*ours, request), (*theirs, reply)]
    assert at_uplink == [("up0", Direction.OUT, request), (*theirs, reply)]
