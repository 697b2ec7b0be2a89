"""Class "venet-loopback": every frame comes back to the guest that sent it."""

from backends.venet.base import VenetBase
from vbus.net import FrameBatch


class VenetLoopback(VenetBase):
    """A venet without a network; for tests and measurements of a driver."""

    def forward(self, batch: FrameBatch) -> None:
        self.deliver(batch, 0, len(batch))
        self.flush()
