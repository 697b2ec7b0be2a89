"""virtio-balloon, -scsi and -9p as far as their configuration goes (R28).

They do no I/O, and say so: a balloon gives buffers back untouched and reclaims no
memory; SCSI answers every command with "bad target"; 9p answers with EOPNOTSUPP.
"""

import errno
import struct
from collections.abc import Sequence
from typing import Final

import trio

from backends.virtio.config import ConfigSpace, Field, Written
from backends.virtio.constants import DeviceId
from backends.virtio.device import (
    Chain,
    DeviceQueue,
    LiveRing,
    MalformedError,
    VirtioDevice,
)
from vbus.errors import InvalidError

BALLOON_FIELDS: Final = (
    Field("num_pages", 0, "I", changes=True),
    Field("actual", 4, "I", written=Written.ANY),
)

SCSI_FIELDS: Final = (
    Field("num_queues", 0, "I"),
    Field("seg_max", 4, "I"),
    Field("max_sectors", 8, "I"),
    Field("cmd_per_lun", 12, "I"),
    Field("event_info_size", 16, "I"),
    Field("sense_size", 20, "I", written=Written.INIT),
    Field("cdb_size", 24, "I", written=Written.INIT),
    Field("max_channel", 28, "H"),
    Field("max_target", 30, "H"),
    Field("max_lun", 32, "I"),
)

_BAD_TARGET: Final = 3
_EVENTS: Final = 1
_R_ERROR: Final = 7
_9P_HEADER: Final = struct.Struct("<IBH")
MOUNT_TAG: Final = 0


class _Refusing(VirtioDevice):
    """Answers every chain of every queue at once, with an error of its kind."""

    def answer(self, queue: DeviceQueue, chain: Chain) -> int:
        """Write the refusal: the number of bytes."""
        raise NotImplementedError

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        done = [(chain, self.answer(queue, chain)) for chain in chains]
        self.complete_batch(queue.index, ring, done)
        await trio.lowlevel.checkpoint()


class VirtioBalloon(_Refusing):
    """Section 5.5. `target` is told to the driver; no page is reclaimed."""

    device_id = DeviceId.BALLOON

    def __init__(self, *, target: int = 0, latch: bool = False) -> None:
        """`target`: pages of 4 KiB in the balloon."""
        super().__init__([128, 128], config=ConfigSpace(BALLOON_FIELDS, latch=latch))
        self.set_target(target)

    def set_target(self, pages: int) -> None:
        """Ask the driver for so many pages."""
        self.change_config(num_pages=pages)

    @property
    def actual(self) -> int:
        """Pages that the driver says are in the balloon."""
        return self.config.number("actual")

    def was_reset(self) -> None:
        self.config.write(4, bytes(4), driver_ok=False)
        self.config.commit()

    def answer(self, queue: DeviceQueue, chain: Chain) -> int:
        return 0


class VirtioScsi(_Refusing):
    """Section 5.6: an adapter without targets."""

    device_id = DeviceId.SCSI
    _SENSE, _CDB = 96, 32

    def __init__(self, *, latch: bool = False) -> None:
        super().__init__([64, 64, 128], config=ConfigSpace(SCSI_FIELDS, latch=latch))
        self.change_config(
            num_queues=1, seg_max=126, max_sectors=0xFFFF, cmd_per_lun=128,
            event_info_size=16, max_target=255, max_lun=16383,
        )  # fmt: skip
        self.was_reset()

    def was_reset(self) -> None:
        self.change_config(sense_size=self._SENSE, cdb_size=self._CDB)

    async def handle(
        self, queue: DeviceQueue, ring: LiveRing, chains: Sequence[Chain]
    ) -> None:
        if queue.index == _EVENTS:  # buffers for events, of which there are none
            await trio.lowlevel.checkpoint()
        else:
            await super().handle(queue, ring, chains)

    def answer(self, queue: DeviceQueue, chain: Chain) -> int:
        sense = self.config.number("sense_size")
        if queue.index == 0:  # task management: only the response byte
            size, response_at = 1, 0
        else:  # sense_len, residual, qualifier, status, response, sense
            size, response_at = 12 + sense, 11
        if chain.writable <= response_at:
            raise MalformedError("a request without room for the response")
        reply = bytearray(min(size, chain.writable))
        reply[response_at] = _BAD_TARGET
        chain.write(0, bytes(reply))
        return len(reply)


class VirtioNinep(_Refusing):
    """Section 5.10 of the drafts; its tag is the whole configuration."""

    device_id = DeviceId.NINEP

    def __init__(self, tag: str, *, latch: bool = False) -> None:
        """`tag` is what the guest mounts. Raises InvalidError."""
        data = tag.encode()
        if not 1 <= len(data) <= 255:
            raise InvalidError(f"a mount tag has 1 to 255 bytes, not {len(data)}")
        fields = (Field("tag_len", 0, "H"), Field("tag", 2, f"{len(data)}s"))
        config = ConfigSpace(fields, latch=latch)
        super().__init__([128], features=1 << MOUNT_TAG, config=config)
        self.change_config(tag_len=len(data), tag=data)

    def answer(self, queue: DeviceQueue, chain: Chain) -> int:
        """Rlerror, 9P2000.L's message with a number."""
        size = _9P_HEADER.size + 4
        if chain.readable < _9P_HEADER.size or chain.writable < size:
            raise MalformedError("a message without its header or room for an answer")
        tag = _9P_HEADER.unpack(chain.read(0, _9P_HEADER.size))[2]
        head = _9P_HEADER.pack(size, _R_ERROR, tag)
        chain.write(0, head + struct.pack("<I", errno.EOPNOTSUPP))
        return size
