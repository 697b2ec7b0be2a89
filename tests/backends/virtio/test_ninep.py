"""virtio-9p: its mount tag; every message is answered with EOPNOTSUPP."""

import errno
import struct

import pytest

from backends.virtio.constants import Status
from backends.virtio.small import VirtioNinep
from tests.backends.virtio.rig import rigged, settle
from vbus.errors import InvalidError


async def test_a_message_is_refused_with_its_tag() -> None:
    async with rigged(VirtioNinep("share")) as rig:
        rig.start()
        message = struct.pack("<IBHIH6s", 19, 100, 0x1234, 8192, 6, b"9P2000")
        answer = await rig.request(0, message, 128)
        assert struct.unpack("<IBHI", answer) == (11, 7, 0x1234, errno.EOPNOTSUPP)


def test_the_tag_is_the_configuration() -> None:
    """R28."""
    device = VirtioNinep("share")
    assert device.read_config(0, device.config.size) == b"\5\0share"
    assert device.offered & 1
    for tag in ("", "x" * 256):
        with pytest.raises(InvalidError):
            VirtioNinep(tag)


@pytest.mark.parametrize(("out", "room"), [(b"short", 11), (bytes(7), 10)])
async def test_what_cannot_be_answered_needs_a_reset(out: bytes, room: int) -> None:
    async with rigged(VirtioNinep("share")) as rig:
        rig.start()
        rig.add(0, out, room)
        await settle()
        assert Status.NEEDS_RESET in rig.device.status
