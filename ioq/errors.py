"""What can go wrong with a ring, beyond what `shm.errors` names."""

import errno as _errno

from shm.errors import VbusError


class RingFault(VbusError):
    """The peer put a value into the ring that the protocol forbids (EIO).

    `reason` is a stable short name such as "inuse-head-range"; the ring refuses
    every further operation.
    """

    errno = _errno.EIO

    def __init__(self, reason: str) -> None:
        super().__init__(f"ring fault: {reason}")
        self.reason = reason
