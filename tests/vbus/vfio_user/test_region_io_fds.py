"""DEVICE_GET_REGION_IO_FDS: doorbells that need no message."""

import errno
import os

from vbus.pci.function import IoEventFd
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command, IoEventFdFlag, IoFdType


async def offers(client, region, argsz=4096):
    body = wire.RegionIoFds(region, argsz=argsz).pack()
    message = await client.call(Command.DEVICE_GET_REGION_IO_FDS, body)
    assert not message.failed
    return wire.RegionIoFds.unpack(message.body), message.fds


async def test_each_handle_has_an_eventfd_with_data_match(bench, client, eventfds):
    ours = eventfds(3)
    bench.function.offers = [
        IoEventFd(8, 4, fd, handle) for handle, fd in enumerate(ours)
    ]
    reply, fds = await offers(client, 1)
    assert reply.total == len(fds) == 3
    for handle, sub in enumerate(reply.subregions):
        assert (sub.offset, sub.size, sub.datamatch) == (8, 4, handle)
        assert sub.type == IoFdType.IOEVENTFD
        assert sub.flags == IoEventFdFlag.DATAMATCH | IoEventFdFlag.PIO
        os.eventfd_write(fds[sub.fd_index], 1)
        assert os.eventfd_read(ours[handle]) == 1
    for fd in fds:
        os.close(fd)


async def test_region_without_shortcuts_gives_none(client):
    reply, fds = await offers(client, 0)
    assert (reply.total, reply.subregions, fds) == (0, (), ())


async def test_any_value_needs_no_data_match_and_a_shared_eventfd_goes_once(
    bench, client, eventfds
):
    (fd,) = eventfds(1)
    bench.function.offers = [IoEventFd(0, 4, fd), IoEventFd(4, 4, fd, 7)]
    reply, fds = await offers(client, 1)
    assert [sub.fd_index for sub in reply.subregions] == [0, 0]
    assert reply.subregions[0].flags == IoEventFdFlag.PIO
    assert len(fds) == 1
    os.close(fds[0])


async def test_no_more_descriptors_than_the_client_can_receive(bench, eventfds):
    """The function is told how many, and offers the newest."""
    client = await bench.attach(wire.Capabilities(max_msg_fds=5))
    bench.function.offers = [IoEventFd(8, 4, fd, n) for n, fd in enumerate(eventfds(9))]
    reply, fds = await offers(client, 1)
    assert (reply.total, len(fds)) == (5, 5)
    assert bench.function.limits == [5]
    for fd in fds:
        os.close(fd)


async def test_kernel_limit_holds_whatever_the_client_says(bench):
    client = await bench.attach(wire.Capabilities(max_msg_fds=1 << 40))
    await offers(client, 1)
    assert bench.function.limits == [wire.SCM_MAX_FD]


async def test_too_little_room_tells_how_much_is_needed(bench, client, eventfds):
    bench.function.offers = [IoEventFd(8, 4, fd, n) for n, fd in enumerate(eventfds(4))]
    reply, fds = await offers(client, 1, argsz=wire.INFO_SIZE)
    assert (reply.total, reply.subregions, fds) == (4, (), ())
    reply, fds = await offers(client, 1, argsz=reply.argsz)
    assert len(fds) == 4
    for fd in fds:
        os.close(fd)


async def test_bad_requests_are_refused(client):
    for body in (b"", wire.RegionIoFds(9).pack(), wire.RegionIoFds(0, argsz=8).pack()):
        code = await client.refused(Command.DEVICE_GET_REGION_IO_FDS, body)
        assert code == errno.EINVAL
