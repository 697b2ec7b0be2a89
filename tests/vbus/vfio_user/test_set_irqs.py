"""DEVICE_SET_IRQS: eventfds in chunks, masks, loopback, and what is refused (R51)."""

import errno
import os
import signal

import pytest

from vbus.pci.constants import Irq, Offset, Region
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command, IrqSetFlag

SET = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
NONE = IrqSetFlag.DATA_NONE
BOOL = IrqSetFlag.DATA_BOOL
MASK, UNMASK = IrqSetFlag.ACTION_MASK, IrqSetFlag.ACTION_UNMASK
TRIGGER = IrqSetFlag.ACTION_TRIGGER


def rung(fd):
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


async def set_irqs(client, *fields, fds=()):
    assert (
        await client.ask(Command.DEVICE_SET_IRQS, wire.SetIrqs(*fields).pack(), fds)
        == b""
    )


@pytest.fixture
async def function(bench, client):
    await client.write(Region.CONFIG, Offset.COMMAND, b"\x06\0")
    return bench.function


async def test_vectors_ring_their_own_eventfds(function, client, eventfds, bench):
    """R51: an interrupt goes to the eventfd set for that vector and no other."""
    fds = eventfds(8)
    await set_irqs(client, SET, Irq.MSIX, 0, 5, fds=fds[:5])
    await set_irqs(client, SET, Irq.MSIX, 5, 3, fds=fds[5:])
    for vector in range(8):
        assert function.interrupt(vector)
        assert [rung(fd) for fd in fds] == [int(v == vector) for v in range(8)]
    assert bench.server.statistics().interrupts == 8


async def test_kind_is_chosen_at_each_interrupt(function, client, eventfds):
    """ABI 12.1: a guest may set up MSI after INTx, or give MSI-X up again."""
    intx, msi, msix = fds = eventfds(3)
    assert not function.interrupt(0)
    for fd, irq in zip(fds, (Irq.INTX, Irq.MSI, Irq.MSIX), strict=True):
        await set_irqs(client, SET, irq, 0, 1, fds=[fd])
        assert function.interrupt(0)
        assert rung(fd) == 1
    assert function.interrupt(3)
    assert (rung(msi), rung(msix)) == (1, 0)
    await set_irqs(client, NONE | TRIGGER, Irq.MSIX, 0, 0)
    await set_irqs(client, NONE | TRIGGER, Irq.MSI, 0, 0)
    assert function.interrupt(3)
    assert (rung(intx), rung(msi), rung(msix)) == (1, 0, 0)


async def test_nothing_is_raised_without_bus_mastering(function, client, eventfds):
    """ABI 12.2: a driver that leaves clears bus mastering and frees its memory."""
    (fd,) = eventfds(1)
    await set_irqs(client, SET, Irq.MSI, 0, 1, fds=[fd])
    await client.write(Region.CONFIG, Offset.COMMAND, b"\x02\0")
    assert not function.interrupt(0)
    assert rung(fd) == 0


async def test_eventfds_are_taken_away_by_a_set_without_descriptors(
    function, client, eventfds, open_fds
):
    fds = eventfds(4)
    before = open_fds()
    await set_irqs(client, SET, Irq.MSIX, 0, 4, fds=fds)
    await set_irqs(client, SET, Irq.MSIX, 1, 2)
    assert [function.interrupt(v) for v in range(4)] == [True, False, False, True]
    await set_irqs(client, NONE | TRIGGER, Irq.MSIX, 0, 0)
    assert not any(function.interrupt(v) for v in range(4))
    assert open_fds() == before


async def test_setting_again_replaces(function, client, eventfds, open_fds):
    old, new = eventfds(2)
    await set_irqs(client, SET, Irq.MSI, 0, 1, fds=[old])
    before = open_fds()
    await set_irqs(client, SET, Irq.MSI, 0, 1, fds=[new])
    assert open_fds() == before
    function.interrupt()
    assert (rung(old), rung(new)) == (0, 1)


async def test_reset_forgets_what_a_masked_vector_remembers(function, client, eventfds):
    """Nothing of the life before a reset is delivered to the one after it."""
    (fd,) = eventfds(1)
    await set_irqs(client, SET, Irq.MSIX, 0, 1, fds=[fd])
    await set_irqs(client, NONE | MASK, Irq.MSIX, 0, 1)
    assert function.interrupt(0)
    await client.ask(Command.DEVICE_RESET)
    await set_irqs(client, NONE | UNMASK, Irq.MSIX, 0, 1)
    assert rung(fd) == 0


async def test_masked_vector_rings_once_when_unmasked(function, client, eventfds):
    (fd,) = eventfds(1)
    await set_irqs(client, SET, Irq.INTX, 0, 1, fds=[fd])
    await set_irqs(client, NONE | MASK, Irq.INTX, 0, 1)
    assert function.interrupt()
    assert function.interrupt()
    assert rung(fd) == 0
    await set_irqs(client, NONE | UNMASK, Irq.INTX, 0, 1)
    assert rung(fd) == 1
    await set_irqs(client, NONE | MASK, Irq.INTX, 0, 1)
    await set_irqs(client, NONE | UNMASK, Irq.INTX, 0, 1)
    assert rung(fd) == 0


async def test_intx_rings_again_when_it_is_unmasked_while_it_stands(
    function, client, eventfds
):
    """A level: QEMU deasserts the line at any access, whoever made it."""
    (fd,) = eventfds(1)
    await set_irqs(client, SET, Irq.INTX, 0, 1, fds=[fd])
    function.stands = True
    await set_irqs(client, NONE | UNMASK, Irq.INTX, 0, 1)
    assert rung(fd) == 1
    function.stands = False
    await set_irqs(client, NONE | UNMASK, Irq.INTX, 0, 1)
    assert rung(fd) == 0


async def test_messages_have_no_level(function, client, eventfds):
    (fd,) = eventfds(1)
    await set_irqs(client, SET, Irq.MSIX, 0, 1, fds=[fd])
    function.stands = True
    await set_irqs(client, NONE | UNMASK, Irq.MSIX, 0, 1)
    assert rung(fd) == 0


async def test_client_may_trigger_vectors_itself(function, client, eventfds):
    fds = eventfds(4)
    await set_irqs(client, SET, Irq.MSIX, 0, 4, fds=fds)
    await set_irqs(client, BOOL | TRIGGER, Irq.MSIX, 1, 3, b"\1\0\1")
    assert [rung(fd) for fd in fds] == [0, 1, 0, 1]
    await set_irqs(client, NONE | TRIGGER, Irq.MSIX, 0, 4)
    assert [rung(fd) for fd in fds] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(wire.SetIrqs(0, 2, 0, 1), id="no flags"),
        pytest.param(wire.SetIrqs(SET | NONE, 2, 0, 1), id="two kinds of data"),
        pytest.param(wire.SetIrqs(SET | MASK, 2, 0, 1), id="two actions"),
        pytest.param(
            wire.SetIrqs(IrqSetFlag.DATA_EVENTFD | MASK, 2, 0, 1), id="mask fd"
        ),
        pytest.param(wire.SetIrqs(SET, 2, 0, 9), id="too many"),
        pytest.param(wire.SetIrqs(SET, 2, 8, 1), id="beyond"),
        pytest.param(wire.SetIrqs(SET, 2, 0xFFFFFFFF, 0xFFFFFFFF), id="wraps"),
        pytest.param(wire.SetIrqs(SET, 2, 0, 0), id="none with eventfds"),
        pytest.param(wire.SetIrqs(SET, 3, 0, 1), id="a kind without vectors"),
        pytest.param(wire.SetIrqs(SET, 77, 0, 1), id="no such kind"),
        pytest.param(wire.SetIrqs(BOOL | TRIGGER, 2, 0, 4, b"\1\1"), id="short truth"),
        pytest.param(wire.SetIrqs(NONE | MASK, 2, 0, 0), id="mask nothing"),
    ],
)
async def test_bad_requests_are_refused(function, client, request_):
    code = await client.refused(Command.DEVICE_SET_IRQS, request_.pack())
    assert code == errno.EINVAL
    assert await client.read(0, 0, 1) == b"\0"


async def test_descriptors_that_fit_nothing_are_refused_and_closed(
    function, client, eventfds, open_fds
):
    fds = eventfds(3)
    before = open_fds()
    for request_ in (
        wire.SetIrqs(SET, Irq.MSIX, 0, 2),
        wire.SetIrqs(SET, Irq.MSIX, 0, 4),
        wire.SetIrqs(NONE | TRIGGER, Irq.MSIX, 0, 3),
        wire.SetIrqs(BOOL | TRIGGER, Irq.MSIX, 0, 3, b"\1\1\1"),
        wire.SetIrqs(SET, Irq.MSIX, 7, 3),
    ):
        code = await client.refused(Command.DEVICE_SET_IRQS, request_.pack(), fds)
        assert code == errno.EINVAL
    assert open_fds() == before
    assert not any(function.interrupt(v) for v in range(8))


async def test_only_eventfds_can_be_rung(function, client, eventfds, open_fds):
    """A pipe or a file in its place could block the daemon."""
    reader, writer = os.pipe()
    (fd,) = eventfds(1)
    before = open_fds()
    body = wire.SetIrqs(SET, Irq.MSIX, 0, 2).pack()
    for fds in ([fd, writer], [writer, fd]):
        assert await client.refused(Command.DEVICE_SET_IRQS, body, fds) == errno.EINVAL
    assert not function.interrupt(0)
    assert open_fds() == before
    os.close(reader)
    os.close(writer)


async def test_full_eventfd_does_not_block(function, client, eventfds):
    (fd,) = eventfds(1)
    await set_irqs(client, SET, Irq.MSI, 0, 1, fds=[fd])
    os.eventfd_write(fd, (1 << 64) - 2)
    assert function.interrupt()


@pytest.fixture
def no_blocking():
    """Fail a test that blocks this thread, instead of hanging."""

    def blocked(*_):
        raise TimeoutError("blocked")

    previous = signal.signal(signal.SIGALRM, blocked)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


async def test_client_cannot_make_an_interrupt_block_the_daemon(
    function, client, eventfds, no_blocking
):
    """R51: it shares the eventfd's flags, sets them to block, and fills the counter."""
    (fd,) = eventfds(1)
    await set_irqs(client, SET, Irq.MSI, 0, 1, fds=[fd])
    os.set_blocking(fd, True)
    os.eventfd_write(fd, (1 << 64) - 2)
    assert function.interrupt()
    assert function.interrupt()


async def test_more_descriptors_than_announced_end_the_connection(
    bench, client, eventfds, open_fds
):
    fds = eventfds(17)
    before = open_fds()
    await client.send(Command.DEVICE_SET_IRQS, b"", fds)
    assert await client.ended()
    await client.leave(bench.server)
    assert open_fds() <= before
    assert bench.server.statistics().protocol_errors == 1
