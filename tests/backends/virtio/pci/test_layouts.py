"""Every register layout, driven over a real socket with real rings (R20 to R24)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from backends.virtio.blk import VirtioBlk
from backends.virtio.image import DiskImage
from backends.virtio.pci import LAYOUTS, function
from backends.virtio.rng import VirtioRng
from proxy.memory import DmaMemory
from proxy.tasks import beside
from proxy.vfio_user import connect
from proxy.virtio.device import VirtioDevice
from proxy.virtio.disk import Disk
from proxy.virtio.entropy import Entropy
from tests.backends.virtio.pci.drivers import (
    LEGACY_WAYS,
    WAYS,
    LegacyDevice,
    LineDriver,
    driven,
    driver_for,
    layout_of,
)
from vbus.vfio_user.server import VfioUserServer
from vbus.virtio.common import DeviceId

SIZE = 4 << 20
QUEUE = 128
"""What the driver wants; legacy devices name it themselves."""


@pytest.fixture
def image(tmp_path: Path) -> Iterator[DiskImage]:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, SIZE)
    with DiskImage(path) as image:
        yield image


def test_every_layout_has_a_driver_here() -> None:
    assert {layout_of(way) for way in WAYS} == set(LAYOUTS)


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.parametrize("way", WAYS)
async def test_a_disk_works_in_every_layout(
    tmp_path: Path, image: DiskImage, way: str
) -> None:
    """R20 to R24: identity, features, queues, kicks, interrupts, configuration."""
    model = VirtioBlk(image, serial="sn-1", queues=2, queue_size=QUEUE)
    data = os.urandom(300 << 10)
    with trio.fail_after(20):
        async with driven(model, way, tmp_path) as device:
            assert device.identity.device_id == DeviceId.BLOCK
            assert device.identity.queues == 2
            disk = Disk(device)
            await disk.start(packed=False)
            async with beside(disk.run):
                assert disk.size == SIZE
                assert await disk.serial() == "sn-1"
                await disk.write(512, data)
                await disk.flush()
                assert await disk.read(512, len(data)) == data
            assert model.features == device.features or way == "mirrored"
            assert model.legacy is (way in LEGACY_WAYS)
        assert model.status == 0
    with image.path.open("rb") as file:
        assert file.read(512 + len(data)) == bytes(512) + data


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS)
async def test_entropy_comes_in_every_layout(
    tmp_path: Path, way: str, packed: bool
) -> None:
    """Packed rings, too, where the driver can say so."""
    model = VirtioRng(queue_size=8)
    with trio.fail_after(20):
        async with driven(model, way, tmp_path) as device:
            assert device.identity[:2] == (DeviceId.ENTROPY, 1)
            entropy = Entropy(device)
            await entropy.start(packed=packed)
            async with beside(entropy.run):
                first, second = await entropy.read(5000), await entropy.read(5000)
            assert first != second
            assert len(set(first)) == 256
            assert (len(first), len(second)) == (5000, 5000)


@pytest.mark.parametrize("way", WAYS)
async def test_a_change_of_size_is_told_by_a_configuration_interrupt(
    tmp_path: Path, image: DiskImage, way: str
) -> None:
    """R25: the generation, and a vector or ISR bit of its own."""
    model = VirtioBlk(image, queue_size=QUEUE)
    with trio.fail_after(20):
        async with driven(model, way, tmp_path) as device:
            disk = Disk(device)
            await disk.start()
            async with beside(disk.run):
                os.truncate(image.path, 2 * SIZE)
                model.resized()
                while disk.size == SIZE:  # read by whom the interrupt wakes
                    await trio.lowlevel.checkpoint()
            assert disk.size == 2 * SIZE
            if isinstance(device.transport, LineDriver):
                assert 2 in device.transport.isrs


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.parametrize("layout", ["modern", "legacy"])
async def test_a_client_that_vanishes_leaves_a_function_as_new(
    tmp_path: Path, image: DiskImage, layout: str
) -> None:
    """A machine that is killed resets nothing; the next one finds power-on."""
    model = VirtioBlk(image, queue_size=QUEUE)
    part = function(model, layout)
    server = VfioUserServer(part, tmp_path / "function.sock")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(model.run)
        await nursery.start(server.serve)
        for number in range(3):
            with trio.fail_after(10), DmaMemory(16 << 20) as memory:
                async with connect(server.path, memory) as client:
                    transport = await driver_for(client, layout)
                    interrupts = await transport.start()
                    kind = VirtioDevice if layout == "modern" else LegacyDevice
                    disk = Disk(kind(transport, await transport.identify()))
                    async with beside(lambda: transport.run(interrupts)):  # noqa: B023
                        await disk.start()
                        async with beside(disk.run):
                            await disk.write(512 * number, bytes([number + 1]) * 512)
                    transport.close()
                while server.attached:
                    await trio.lowlevel.checkpoint()
                assert model.status == 0
                assert not part.bus_master
        nursery.cancel_scope.cancel()
    part.close()
    assert image.path.read_bytes()[:1536] == b"\1" * 512 + b"\2" * 512 + b"\3" * 512
