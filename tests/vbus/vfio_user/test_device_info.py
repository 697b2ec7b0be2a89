"""DEVICE_GET_INFO, DEVICE_GET_IRQ_INFO and DEVICE_RESET."""

import errno

import pytest

from vbus.pci.constants import Offset, Region
from vbus.vfio_user import wire
from vbus.vfio_user.wire import Command, DeviceFlag, IrqInfoFlag


async def test_device_is_pci_with_nine_regions_and_five_irq_kinds(client):
    reply = await client.ask(Command.DEVICE_GET_INFO, wire.DeviceInfo().pack())
    info = wire.DeviceInfo.unpack(reply)
    assert info == (DeviceFlag.RESET | DeviceFlag.PCI, 9, 5, 16)


@pytest.mark.parametrize(
    "body", [b"", b"\0" * 15, wire.DeviceInfo(argsz=15).pack()], ids=len
)
async def test_device_info_without_room_is_refused(client, body):
    assert await client.refused(Command.DEVICE_GET_INFO, body) == errno.EINVAL


@pytest.mark.parametrize(("irq", "vectors"), [(0, 1), (1, 1), (2, 8), (3, 0), (4, 0)])
async def test_irq_kinds_have_their_vectors(client, irq, vectors):
    """R1, R10: one INTx, one MSI, eight MSI-X vectors for a whole bus."""
    reply = await client.ask(Command.DEVICE_GET_IRQ_INFO, wire.IrqInfo(irq).pack())
    info = wire.IrqInfo.unpack(reply)
    assert (info.irq, info.vectors) == (irq, vectors)
    assert bool(info.flags & IrqInfoFlag.EVENTFD) == (vectors > 0)


@pytest.mark.parametrize("irq", [5, 1 << 31])
async def test_irq_kind_that_does_not_exist_is_refused(client, irq):
    body = wire.IrqInfo(irq).pack()
    assert await client.refused(Command.DEVICE_GET_IRQ_INFO, body) == errno.EINVAL


async def test_irq_info_without_room_is_refused(client):
    body = wire.IrqInfo(0, argsz=8).pack()
    assert await client.refused(Command.DEVICE_GET_IRQ_INFO, body) == errno.EINVAL
    assert await client.refused(Command.DEVICE_GET_IRQ_INFO, b"x") == errno.EINVAL


async def test_reset_brings_back_the_state_after_power_on(bench, client, memfd):
    await client.map(0, 4096, memfd)
    await client.write(Region.CONFIG, Offset.COMMAND, b"\x07\0")
    await client.write(Region.CONFIG, Offset.BAR0, b"\0\0\xab\xfe")
    assert await client.ask(Command.DEVICE_RESET) == b""
    assert await client.read(Region.CONFIG, Offset.COMMAND, 2) == b"\0\0"
    assert await client.read(Region.CONFIG, Offset.BAR0, 4) == b"\0\0\0\0"
    assert bench.function.seen("reset") == [()]
    assert len(bench.function.memory.regions()) == 1
    assert bench.server.statistics().resets == 1
