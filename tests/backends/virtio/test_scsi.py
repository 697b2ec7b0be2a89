"""virtio-scsi: its configuration; every command is refused as having no target."""

import struct

from backends.virtio.constants import Status
from backends.virtio.small import VirtioScsi
from tests.backends.virtio.rig import rigged, settle


async def test_a_command_finds_no_target() -> None:
    async with rigged(VirtioScsi()) as rig:
        rig.start()
        answer = await rig.request(2, bytes(51), 108 + 512)
        assert len(answer) == 108
        assert struct.unpack_from("<IIHBB", answer) == (0, 0, 0, 0, 3)
        assert await rig.request(0, bytes(24), 1) == b"\3"


async def test_event_buffers_are_kept_and_short_responses_need_a_reset() -> None:
    async with rigged(VirtioScsi()) as rig:
        rig.start()
        rig.add(1, room=16)
        await settle()
        assert not rig.collect(1)
        assert Status.NEEDS_RESET not in rig.device.status
        rig.add(2, bytes(51), 5)
        await settle()
        assert Status.NEEDS_RESET in rig.device.status


async def test_sense_and_command_sizes_are_the_drivers_until_driver_ok() -> None:
    """R28."""
    scsi = VirtioScsi()
    async with rigged(scsi) as rig:
        rig.negotiate()
        scsi.write_config(20, b"\x20\0\0\0")
        assert scsi.config.get("sense_size") == 32
        scsi.set_status(0)
        assert scsi.config.get("sense_size") == 96
        rig.start()
        scsi.write_config(20, b"\x20\0\0\0")
        assert scsi.config.get("sense_size") == 96


async def test_a_large_sense_size_makes_no_large_answer() -> None:
    scsi = VirtioScsi()
    async with rigged(scsi) as rig:
        scsi.write_config(20, b"\xff\xff\xff\xff")
        rig.start()
        scsi.config.write(20, b"\xff\xff\xff\x7f", driver_ok=False)
        assert len(await rig.request(2, bytes(51), 108)) == 108
