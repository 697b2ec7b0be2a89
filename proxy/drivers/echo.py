"""The driver of "org.vbus.echo", by which a guest can see that all is well.

Calls the device once, then keeps its two rings: who has the driver can send messages
and gets them back.
"""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from proxy.device import DeviceProxy, NorthConsumer, NorthProducer
from vbus.errors import InvalidError, ProtocolError

ECHO = 0
REQUESTS, REPLIES = 0, 1
RING_COUNT = 64
SLOT_SIZE = 2048
_GREETING = b"vbus"


@dataclass(frozen=True)
class EchoStatistics:
    """Messages that went to the device and came back."""

    sent: int
    received: int


class EchoDriver:
    """Drives one echo device."""

    def __init__(self, device: DeviceProxy, options: Mapping[str, object]) -> None:
        """Take no options. Raises InvalidError."""
        if options:
            raise InvalidError(f"the echo driver has no option {min(options)!r}")
        self.device = device
        self.requests: NorthProducer | None = None
        self.replies: NorthConsumer | None = None
        self._sent = self._received = 0

    async def run(self, started: Callable[[str], None]) -> None:
        """Open, try a call, share both rings, and stay."""
        async with self.device.opened():
            _, answer = await self.device.call(ECHO, _GREETING)
            if answer != _GREETING:
                raise ProtocolError(f"{self.device.name} answers {answer!r}")
            self.requests = await self.device.producer(
                REQUESTS, RING_COUNT, slot_size=SLOT_SIZE
            )
            self.replies = await self.device.consumer(
                REPLIES, RING_COUNT, slot_size=SLOT_SIZE
            )
            started("answers")
            await trio.sleep_forever()

    async def exchange(self, message: bytes) -> bytes:
        """Send a message of up to SLOT_SIZE bytes through the rings; give the answer.

        One task at a time. Raises InvalidError before `run` has started.
        """
        if self.requests is None or self.replies is None:
            raise InvalidError(f"{self.device.name} is not started")
        await self.requests.send(message, len(message))
        self._sent += 1
        answer, sizes = bytearray(SLOT_SIZE), array("I", [0])
        await self.replies.receive(answer, sizes)
        self._received += 1
        return bytes(answer[: sizes[0]])

    def statistics(self) -> EchoStatistics:
        """A snapshot of the counters."""
        return EchoStatistics(self._sent, self._received)
