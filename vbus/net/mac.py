"""Ethernet addresses: parsed, printed, and stable ones made from a name."""

import hashlib
import re
from typing import Self

from vbus.errors import InvalidError

_FORM = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class MacAddress(bytes):
    """Six octets that print as aa:bb:cc:dd:ee:ff; compare and hash like bytes."""

    __slots__ = ()

    def __new__(cls, octets: bytes) -> Self:
        """Take six octets. Raises InvalidError."""
        if len(octets) != 6:
            raise InvalidError(f"a MAC address has 6 octets, not {len(octets)}")
        return super().__new__(cls, octets)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read aa:bb:cc:dd:ee:ff, which must be one station's. Raises InvalidError."""
        if not _FORM.fullmatch(text.lower()):
            raise InvalidError(f"{text!r} is not of the form aa:bb:cc:dd:ee:ff")
        mac = cls(bytes.fromhex(text.replace(":", "")))
        if mac.is_group or mac == bytes(6):
            raise InvalidError(f"{text} cannot be the address of one station")
        return mac

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Make an address of local administration, always the same for a name."""
        octets = hashlib.blake2b(name.encode(), digest_size=6).digest()
        return cls(bytes([octets[0] & 0xFC | 0x02]) + octets[1:])

    @property
    def is_group(self) -> bool:
        """Multicast or broadcast."""
        return bool(self[0] & 1)

    def __str__(self) -> str:
        return self.hex(":")

    def __repr__(self) -> str:
        return f"MacAddress({str(self)!r})"
