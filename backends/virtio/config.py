"""A device's configuration space: named fields in little-endian bytes (R25, R27).

Every field declares who may change it and when, so the audit table of R28 can be read
from the models, and nothing else is possible: a driver's write to any other byte has no
effect (virtio 1.2, 2.5.2).

Reads are made atomic by the generation: it moves whenever the device changes a byte,
and a driver that saw it move reads again. Writes have none in virtio 1.x; with `latch`
they go to a scratch copy that remembers which bytes were written, and `commit()` puts
just those in place:

    write 1, write 3, commit      bytes 1 and 3 take effect, byte 2 is not touched
    a field the device changes    loses what was written to it before the commit
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TypeAlias

from vbus.errors import InvalidError

Value: TypeAlias = int | bytes


class Written(Enum):
    """When a driver may write a field."""

    NEVER = "never"
    INIT = "init"
    """Only before DRIVER_OK."""
    ANY = "any"


@dataclass(frozen=True)
class Field:
    """One field. `form`: a struct code such as "I", "H" or "6s"."""

    name: str
    offset: int
    form: str
    changes: bool = False
    """The device itself changes it while a driver uses it."""
    written: Written = Written.NEVER

    @cached_property
    def codec(self) -> struct.Struct:
        """What packs and unpacks it."""
        return struct.Struct("<" + self.form)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.codec.size

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + self.size


class ConfigSpace:
    """The bytes, the generation and the commit latch."""

    def __init__(self, fields: Iterable[Field] = (), *, latch: bool = False) -> None:
        self.fields = {field.name: field for field in fields}
        self.latch = latch
        self.generation = 0
        self.sealed = False
        """A driver is there: from now on only fields that say so change."""
        self.size = max((field.end for field in self.fields.values()), default=0)
        self._bytes = bytearray(self.size)
        self._scratch: dict[int, int] = {}

    def get(self, name: str) -> Value:
        """A field's value. Raises KeyError."""
        field = self.fields[name]
        value: Value = field.codec.unpack_from(self._bytes, field.offset)[0]
        return value

    def number(self, name: str) -> int:
        """A number's value. Raises KeyError."""
        value = self.get(name)
        assert isinstance(value, int)
        return value

    def set(self, name: str, value: Value) -> bool:
        """Change a field from the device's side: did it? Raises InvalidError.

        What a driver wrote to the field and did not commit is dropped.
        """
        field = self.fields[name]
        try:
            data = field.codec.pack(value)
        except struct.error as error:
            raise InvalidError(f"{name} cannot be {value!r}: {error}") from None
        for at in range(field.offset, field.end):
            self._scratch.pop(at, None)
        if data == self._bytes[field.offset : field.end]:
            return False
        if self.sealed and not field.changes:
            raise InvalidError(f"{name} is fixed while a driver uses the device")
        self._bytes[field.offset : field.end] = data
        self.generation += 1
        return True

    def read(self, offset: int, size: int) -> bytes:
        """Bytes as a driver sees them; zeros behind the end."""
        found = bytes(self._bytes[offset : offset + size]) if offset >= 0 else b""
        return found.ljust(max(size, 0), b"\0")

    def write(self, offset: int, data: bytes, *, driver_ok: bool) -> list[str]:
        """Take a driver's write: the fields that were changed by it, at once.

        With the latch none is, until `commit`. What may not be written is ignored.
        """
        allowed = {
            at: data[at - offset]
            for field in self.fields.values()
            if field.written is Written.ANY
            or (field.written is Written.INIT and not driver_ok)
            for at in range(
                max(field.offset, offset), min(field.end, offset + len(data))
            )
        }
        if self.latch:
            self._scratch.update(allowed)
            return []
        return self._apply(allowed)

    def commit(self) -> list[str]:
        """Let the written bytes take effect: the fields they are in."""
        scratch, self._scratch = self._scratch, {}
        return self._apply(scratch)

    def forget_writes(self) -> None:
        """Drop what was not committed (reset)."""
        self._scratch.clear()

    def _apply(self, written: dict[int, int]) -> list[str]:
        for at, value in written.items():
            self._bytes[at] = value
        return [
            field.name
            for field in self.fields.values()
            if any(field.offset <= at < field.end for at in written)
        ]
