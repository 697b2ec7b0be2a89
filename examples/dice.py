"""A device that throws dice. Run it: python examples/dice.py sides=20"""

import secrets

from vbus.device import Connection, Device, attribute, call, main
from vbus.errors import InvalidError


class Dice(Device):
    """Call 0 fills the guest's buffer with throws, one byte each."""

    type = "org.example.dice"
    max_connections = 8

    sides = attribute(int, default=6, writable=True, doc="Sides of each die, 2 to 255.")

    def setup(self) -> None:
        self.attribute_changed("sides")

    def attribute_changed(self, name: str) -> None:
        if not 2 <= self.sides <= 255:
            raise InvalidError(f"a die cannot have {self.sides} sides")

    @call(0)
    def throw(self, connection: Connection, data: bytes) -> bytes:
        return bytes(1 + secrets.randbelow(self.sides) for _ in data)


if __name__ == "__main__":
    main(Dice)
