"""DEVICE_GET_REGION_INFO: sizes, rights, and parts that can be mapped."""

import errno
import mmap
import os

import pytest

from shm import create_memfd
from vbus.pci.function import RegionInfo
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command, RegionFlag

READ_WRITE = RegionFlag.READ | RegionFlag.WRITE


async def info(client, region, argsz=wire.REGION_INFO_SIZE):
    body = wire.RegionInfo(region, argsz=argsz).pack()
    message = await client.call(Command.DEVICE_GET_REGION_INFO, body)
    assert not message.failed
    return wire.RegionInfo.unpack(message.body), message.fds


@pytest.mark.parametrize(
    ("region", "size"), [(0, 64), (1, 32), (2, 4096), (3, 0), (6, 0), (7, 256), (8, 0)]
)
async def test_regions_have_their_sizes(client, region, size):
    """R1: three BARs and configuration space are the whole footprint."""
    described, fds = await info(client, region)
    flags = READ_WRITE if size else 0
    assert described == (region, flags, size, 0, (), wire.REGION_INFO_SIZE)
    assert fds == ()


@pytest.mark.parametrize("region", [9, 1 << 31])
async def test_region_that_does_not_exist_is_refused(client, region):
    body = wire.RegionInfo(region).pack()
    assert await client.refused(Command.DEVICE_GET_REGION_INFO, body) == errno.EINVAL


async def test_request_without_room_is_refused(client):
    for body in (b"", wire.RegionInfo(0, argsz=31).pack()):
        code = await client.refused(Command.DEVICE_GET_REGION_INFO, body)
        assert code == errno.EINVAL


@pytest.fixture
def register_file(bench):
    fd = create_memfd("registers", 3 * 4096)
    os.pwrite(fd, b"mapped", 4096)
    areas = ((4096, 4096), (8192, 4096))
    bench.function.mappable = RegionInfo(3 * 4096, fd=fd, mappable=areas)
    yield fd
    os.close(fd)


async def test_mappable_parts_come_with_a_descriptor(client, register_file):
    described, fds = await info(client, 0, argsz=1024)
    assert described.flags == READ_WRITE | RegionFlag.MMAP | RegionFlag.CAPS
    assert described.areas == ((4096, 4096), (8192, 4096))
    (fd,) = fds
    with mmap.mmap(fd, 4096, offset=4096) as mapped:
        assert mapped[:6] == b"mapped"
    os.close(fd)


async def test_too_little_room_for_the_parts_tells_how_much_is_needed(
    client, register_file
):
    """The client then asks again; QEMU fails on a CAPS flag without capabilities."""
    described, fds = await info(client, 0)
    assert described.flags == READ_WRITE | RegionFlag.MMAP
    assert (described.areas, fds) == ((), ())
    described, fds = await info(client, 0, argsz=described.argsz)
    assert len(described.areas) == 2
    os.close(fds[0])


async def test_region_that_is_mappable_as_a_whole_has_no_list(
    bench, client, register_file
):
    bench.function.mappable = RegionInfo(4096, writable=False, fd=register_file)
    described, fds = await info(client, 0)
    assert described.flags == RegionFlag.READ | RegionFlag.MMAP
    assert described.areas == ()
    os.close(fds[0])
