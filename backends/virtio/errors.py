"""What can go wrong with a virtqueue, beyond what `vbus.errors` names."""

from vbus.errors import ProtocolError

_REASONS = {
    "avail-index": "the driver made more available than the ring holds",
    "head-range": "a chain begins outside the descriptor table",
    "next-range": "a chain goes on outside its table",
    "chain-length": "a chain loops, or has more descriptors than the queue",
    "chain-bytes": "a chain has 4 GiB or more",
    "buffer-empty": "a buffer has no bytes",
    "buffer-order": "a device-readable buffer follows a writable one",
    "buffer-address": "a buffer is not memory of the guest, or not writable",
    "buffer-pieces": "a chain crosses too many borders between memory regions",
    "indirect-refused": "an indirect table, which was not negotiated",
    "indirect-next": "an indirect table and a next descriptor in one",
    "indirect-size": "an indirect table that is empty, cut or longer than the queue",
    "indirect-address": "an indirect table is not memory of the guest",
    "indirect-nested": "an indirect table inside an indirect table",
    "ring-unmapped": "the guest unmapped the ring's memory",
    "record-unmapped": "the connection that kept the in-flight record has ended",
}


class VirtQueueError(ProtocolError):
    """The driver broke a virtqueue, which the device answers with NEEDS_RESET (EPROTO).

    `reason` is a stable short name such as "next-range"; no chain comes any more.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{_REASONS[reason]} ({reason})")
        self.reason = reason
