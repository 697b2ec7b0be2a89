"""R28: what the table says is what the models do, under a driver."""

from collections.abc import Callable
from pathlib import Path

import pytest

from backends.virtio.audit import TABLE, audit
from backends.virtio.blk import VirtioBlk
from backends.virtio.channels import LogFile
from backends.virtio.config import Written
from backends.virtio.console import Port, VirtioConsole
from backends.virtio.constants import DeviceId
from backends.virtio.device import VirtioDevice
from backends.virtio.image import DiskImage
from backends.virtio.net import VirtioNet
from backends.virtio.rng import VirtioRng
from backends.virtio.small import VirtioBalloon, VirtioNinep, VirtioScsi
from tests.backends.virtio.rig import rigged
from vbus.errors import InvalidError
from vbus.net import FrameBatch, MacAddress

MAC = MacAddress.parse("02:00:00:00:00:0a")


class Nowhere:
    def forward(self, batch: FrameBatch) -> None:
        pass

    def set_mac(self, mac: MacAddress) -> None:
        pass


def blk(folder: Path) -> VirtioBlk:
    (folder / "disk").write_bytes(bytes(1 << 20))
    return VirtioBlk(DiskImage(folder / "disk"))


MODELS: dict[DeviceId, Callable[[Path], VirtioDevice]] = {
    DeviceId.NET: lambda folder: VirtioNet(Nowhere(), MAC),
    DeviceId.BLOCK: blk,
    DeviceId.CONSOLE: lambda folder: VirtioConsole([Port(LogFile(folder / "log"))]),
    DeviceId.ENTROPY: lambda folder: VirtioRng(),
    DeviceId.BALLOON: lambda folder: VirtioBalloon(),
    DeviceId.SCSI: lambda folder: VirtioScsi(),
    DeviceId.NINEP: lambda folder: VirtioNinep("share"),
}


def close(device: VirtioDevice) -> None:
    if isinstance(device, VirtioBlk):
        device.image.close()
    elif isinstance(device, VirtioConsole):
        for port in device.ports:
            port.channel.close()


def test_the_table_has_every_model() -> None:
    assert TABLE.keys() == MODELS.keys()


@pytest.mark.parametrize("id", MODELS)
async def test_a_model_does_what_its_row_says(id: DeviceId, tmp_path: Path) -> None:
    """Every field: changed by the device, written before and after DRIVER_OK."""
    device = MODELS[id](tmp_path)
    row = TABLE[id]
    assert device.device_id == id
    assert audit(device.config) == row
    async with rigged(device) as rig:
        rig.start()
        for field in device.config.fields.values():
            before = device.config.read(field.offset, field.size)
            other = bytes(byte ^ 1 for byte in before)
            value = other if field.form[-1] == "s" else int.from_bytes(other, "little")
            if field.name in row.changes:
                assert device.config.set(field.name, value)
            else:
                with pytest.raises(InvalidError):
                    device.config.set(field.name, value)
        device.set_status(0)
    close(device)


@pytest.mark.parametrize("id", MODELS)
@pytest.mark.parametrize("live", [False, True])
async def test_a_driver_can_write_just_the_fields_of_the_row(
    id: DeviceId, live: bool, tmp_path: Path
) -> None:
    device = MODELS[id](tmp_path)
    row = TABLE[id]
    async with rigged(device) as rig:
        rig.negotiate(legacy=True)
        if live:
            rig.start(legacy=True)
            if isinstance(device, VirtioNet):  # else the control queue has it
                device.features &= ~(1 << 23)
        for field in device.config.fields.values():
            before = device.config.read(field.offset, field.size)
            other = bytes(byte ^ 2 for byte in before)
            device.write_config(field.offset, other)
            after = device.config.read(field.offset, field.size)
            allowed = field.name in row.written and (row.after_init or not live)
            assert after == (other if allowed else before), field
            assert allowed == (
                field.written is Written.ANY
                or (field.written is Written.INIT and not live)
            )
    close(device)
