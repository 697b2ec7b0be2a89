"""Who changes the configuration of which device, and when: the audit of 2012 (R28).

The question behind it: does a transport need atomic configuration writes? The answer of
this table: only net's address (legacy) is written by drivers as more than one unit, and
virtio 1.x moved that to the control queue.
"""

from dataclasses import dataclass
from typing import Final

from backends.virtio.config import ConfigSpace, Written
from backends.virtio.constants import DeviceId


@dataclass(frozen=True)
class Row:
    """One device. `changes` and `written` name the fields; `after_init`: see there."""

    has_config: bool
    changes: tuple[str, ...] = ()
    """Fields the device changes while a driver uses it."""
    written: tuple[str, ...] = ()
    """Fields the driver writes."""
    after_init: bool = False
    """Does the driver write after DRIVER_OK too?"""


TABLE: Final = {
    DeviceId.NET: Row(True, ("mac", "status"), ("mac",), True),
    DeviceId.BLOCK: Row(True, ("capacity", "cylinders"), ("writeback",), True),
    DeviceId.CONSOLE: Row(True, ("cols", "rows"), ("emerg_wr",), True),
    DeviceId.ENTROPY: Row(False),
    DeviceId.BALLOON: Row(True, ("num_pages",), ("actual",), True),
    DeviceId.SCSI: Row(True, (), ("sense_size", "cdb_size"), False),
    DeviceId.NINEP: Row(True),
}


def audit(config: ConfigSpace) -> Row:
    """Read a model's row from what its configuration declares, and enforces."""
    fields = config.fields.values()
    return Row(
        has_config=config.size > 0,
        changes=tuple(field.name for field in fields if field.changes),
        written=tuple(f.name for f in fields if f.written is not Written.NEVER),
        after_init=any(field.written is Written.ANY for field in fields),
    )
