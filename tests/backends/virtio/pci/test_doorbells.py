"""Kicks by eventfd, as a client with an in-kernel path asks for them."""

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from backends.virtio.pci import LAYOUTS
from tests.backends.virtio.pci.drivers import shown
from tests.backends.virtio.pci.registers import Sample, bench
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command, IoEventFdFlag, IoFdType

NOTIFY = {
    "modern": (4, [(0x3000, None), (0x3004, None)]),
    "mirrored": (1, [(16, 0), (16, 1)]),
    "legacy": (0, [(16, 0), (16, 1)]),
    "four-bar": (0, [(16, 0), (16, 1)]),
}


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.parametrize("layout", NOTIFY)
async def test_an_eventfd_kicks_the_queue_it_is_for(
    tmp_path: Path, layout: str
) -> None:
    """By its address, or by the value where all queues share one."""
    bar, places = NOTIFY[layout]
    model = Sample()
    async with shown(model, layout, tmp_path) as here:
        room = wire.INFO_SIZE + 8 * wire.IO_FD_SIZE
        reply = await here.client._request(
            Command.DEVICE_GET_REGION_IO_FDS,
            wire.RegionIoFds(bar, argsz=room).pack(),
        )
        try:
            offers = wire.RegionIoFds.unpack(reply.body).subregions
            assert [
                (
                    at.offset,
                    at.datamatch if at.flags & IoEventFdFlag.DATAMATCH else None,
                )
                for at in offers
            ] == places
            assert {(at.size, at.type) for at in offers} == {(2, IoFdType.IOEVENTFD)}
            for index in (1, 0, 1):
                os.eventfd_write(reply.fds[offers[index].fd_index], 1)
                await trio.testing.wait_all_tasks_blocked()
            assert model.kicks == [1, 0, 1]
        finally:
            for fd in reply.fds:
                os.close(fd)


async def test_a_client_that_left_kicks_nobody_any_more(nursery: trio.Nursery) -> None:
    """R51: its eventfds were for its own time."""
    with bench("modern") as part:
        nursery.start_soon(part.function.run)
        await trio.testing.wait_all_tasks_blocked()
        first, _ = part.function.io_eventfds(4, 8)
        kept = os.dup(first.fd)
        try:
            part.function.detach()
            part.function.attach(part)
            second, _ = part.function.io_eventfds(4, 8)
            os.eventfd_write(kept, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert part.model.kicks == []
            os.eventfd_write(second.fd, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert part.model.kicks == [0]
        finally:
            os.close(kept)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_is_offered_what_nobody_serves(layout: str) -> None:
    with bench(layout) as part:
        assert [part.function.io_eventfds(bar, 8) for bar in range(6)] == [[]] * 6
