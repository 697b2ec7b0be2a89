"""What can go wrong with a virtqueue that we drive."""

from vbus.errors import ProtocolError

_REASONS = {
    "used-index": "the device gave back more chains than it has",
    "used-id": "the device gave back a chain that it does not have",
    "used-length": "the device wrote more than a chain has room for",
    "ring-unmapped": "the ring's memory is gone",
}


class DriverQueueError(ProtocolError):
    """The device broke a virtqueue; it needs a reset (EPROTO).

    `reason` is a stable short name such as "used-id".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{_REASONS[reason]} ({reason})")
        self.reason = reason
