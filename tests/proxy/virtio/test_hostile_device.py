"""Drivers against devices that break the rules: an error or a count, nothing worse."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from backends.virtio.adapter import VirtioOnBus
from backends.virtio.blk import FIELDS as BLK_FIELDS
from backends.virtio.config import ConfigSpace
from backends.virtio.constants import DeviceId, bits
from backends.virtio.device import Chain, DeviceQueue, LiveRing, VirtioDevice
from backends.virtio.net import FIELDS as NET_FIELDS
from proxy.bridge import BridgeDriver
from proxy.tasks import beside
from proxy.virtio.card import Card
from proxy.virtio.disk import Disk, DiskError
from proxy.virtio.entropy import Entropy
from tests.proxy.host import hosted, until
from tests.proxy.virtio.guests import found, guest_of
from vbus.errors import InvalidError, NoDeviceError, ProtocolError, VbusError
from vbus.virtio.blk import Feature as Blk
from vbus.virtio.net import HEADER, Feature

Answer = Callable[[Chain], int]


class Scripted(VirtioDevice):
    """Answers each chain by a function of the test; deaf on other queues."""

    def __init__(
        self,
        device_id: int,
        answers: Sequence[Answer],
        *,
        queues: int = 2,
        features: int = 0,
        config: ConfigSpace | None = None,
    ) -> None:
        super().__init__([64] * queues, features=features, config=config)
        self.device_id = device_id  # type: ignore[misc, assignment]
        self.answers = list(answers)

    async def drive(self, queue: DeviceQueue, ring: LiveRing) -> None:
        if queue.index:
            await trio.sleep_forever()
        await super().drive(queue, ring)

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        for chain in chains:
            if not self.answers:
                await trio.sleep_forever()
            self.complete(queue.index, ring, chain, self.answers.pop(0)(chain))
        await trio.lowlevel.checkpoint()


def gives(data: bytes) -> Answer:
    def answer(chain: Chain) -> int:
        chain.write(0, data)
        return len(data)

    return answer


def device_class(model: VirtioDevice) -> type[VirtioOnBus]:
    class Hostile(VirtioOnBus):
        def setup(self) -> None:
            self.model = model

    return Hostile


def header(buffers: int) -> bytes:
    return HEADER.pack(0, 0, 0, 0, 0, 0, buffers)


def card_model(answers: Sequence[Answer]) -> Scripted:
    features = bits(Feature.MAC, Feature.MTU, Feature.STATUS, Feature.MRG_RXBUF)
    config = ConfigSpace(NET_FIELDS)
    return Scripted(DeviceId.NET, answers, features=features, config=config)


FRAME = bytes(60)


@pytest.mark.parametrize(
    "answers",
    [
        [gives(b"")],
        [gives(bytes(11))],
        [gives(header(0) + FRAME)],
        [gives(header(257) + FRAME)],
        [gives(header(65535) + FRAME)],
    ],
    ids=["nothing", "short", "no-buffer", "too-many", "most"],
)
async def test_a_frame_with_a_bad_header_is_counted(
    tmp_path: Path, answers: list[Answer]
) -> None:
    good = gives(header(1) + b"good" + FRAME)
    model = card_model([*answers, good, gives(header(2) + b"in"), gives(b"two")])
    async with (
        hosted(tmp_path, {"bad": device_class(model)}) as host,
        guest_of(host) as bridge,
    ):
        host.add("card0", "bad")
        async with found(bridge, "card0") as device:
            card = Card(device)
            await card.start()
            frames: list[list[bytes]] = []
            with trio.fail_after(5):
                while len(frames) < 2:
                    frames += await card.receive()
                    card.done()
            assert b"".join(frames[0])[12:] == b"good" + FRAME
            assert b"".join(frames[1])[12:] == b"intwo"
            assert card.statistics().rx_errors == 1
            assert card.statistics().rx_frames == 2


def disk_model(answers: Sequence[Answer]) -> Scripted:
    config = ConfigSpace(BLK_FIELDS)
    config.set("capacity", 2048)
    return Scripted(
        DeviceId.BLOCK, answers, features=bits(Blk.FLUSH), queues=1, config=config
    )


async def with_disk(
    bridge: BridgeDriver, body: Callable[[Disk], Any], *, error: type[Exception]
) -> None:
    async with found(bridge, "disk0") as device:
        disk = Disk(device)
        await disk.start()
        async with beside(disk.run):
            with trio.fail_after(5), pytest.raises(error):
                await body(disk)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda chain: 0, ProtocolError),
        (lambda chain: chain.write(chain.writable - 1, b"\1") or 1, DiskError),
        (lambda chain: chain.write(chain.writable - 1, b"\2") or 1, DiskError),
        (lambda chain: chain.write(chain.writable - 1, b"\x77") or 1, DiskError),
    ],
    ids=["no-status", "error", "unsupported", "unknown"],
)
async def test_an_answer_that_is_no_success_is_an_error(
    tmp_path: Path, answer: Answer, error: type[Exception]
) -> None:
    async with (
        hosted(tmp_path, {"bad": device_class(disk_model([answer]))}) as host,
        guest_of(host) as bridge,
    ):
        host.add("disk0", "bad")
        await with_disk(bridge, lambda disk: disk.read(0, 512), error=error)


async def test_no_entropy_is_an_error(tmp_path: Path) -> None:
    model = Scripted(DeviceId.ENTROPY, [lambda chain: 0], queues=1)
    async with (
        hosted(tmp_path, {"bad": device_class(model)}) as host,
        guest_of(host) as bridge,
    ):
        host.add("rng0", "bad")
        async with found(bridge, "rng0") as device:
            entropy = Entropy(device)
            await entropy.start()
            with pytest.raises(ProtocolError, match="no entropy"):
                async with beside(entropy.run):
                    await entropy.read(64)


async def test_a_device_that_needs_a_reset_ends_its_driver(tmp_path: Path) -> None:
    """Whoever waits for an answer is told, too."""
    model = disk_model([])
    async with (
        hosted(tmp_path, {"bad": device_class(model)}) as host,
        guest_of(host) as bridge,
    ):
        host.add("disk0", "bad")
        async with found(bridge, "disk0") as device:
            disk = Disk(device)
            await disk.start()

            async def expect_the_end(error: type[Exception], body: Any) -> None:
                with pytest.raises(error):
                    await body()

            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(expect_the_end, ProtocolError, disk.run)
                    read = partial(disk.read, 0, 512)
                    nursery.start_soon(expect_the_end, NoDeviceError, read)
                    await until(lambda: disk._queues[0].queue.core.in_flight)
                    model.fail("the test says so")


async def test_a_device_without_version_1_is_refused(tmp_path: Path) -> None:
    model = Scripted(DeviceId.ENTROPY, [], queues=1)
    model._own = 0
    async with (
        hosted(tmp_path, {"bad": device_class(model)}) as host,
        guest_of(host) as bridge,
    ):
        host.add("rng0", "bad")
        async with found(bridge, "rng0") as device:
            with pytest.raises(InvalidError, match="legacy"):
                await Entropy(device).start()


async def test_a_device_that_refuses_its_own_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Scripted(DeviceId.ENTROPY, [], queues=1)
    monkeypatch.setattr(model, "_settle_features", lambda: False)
    async with (
        hosted(tmp_path, {"bad": device_class(model)}) as host,
        guest_of(host) as bridge,
    ):
        host.add("rng0", "bad")
        async with found(bridge, "rng0") as device:
            with pytest.raises(ProtocolError, match="refuses the features"):
                await Entropy(device).start()


async def test_a_device_without_queues_is_refused(tmp_path: Path) -> None:
    model = Scripted(DeviceId.NET, [], queues=1)
    model.config = ConfigSpace(NET_FIELDS)
    async with (
        hosted(tmp_path, {"bad": device_class(model)}) as host,
        guest_of(host) as bridge,
    ):
        host.add("card0", "bad")
        async with found(bridge, "card0") as device:
            with pytest.raises(VbusError, match="no queue 1"):
                await Card(device).start()
