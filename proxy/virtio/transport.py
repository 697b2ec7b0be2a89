"""What a virtio driver needs of the way its device is reached."""

from typing import NamedTuple, Protocol

from proxy.device import Wake
from proxy.memory import DmaBuffer
from proxy.virtio.ring import RingLayout
from shm import AddressSpace


class Identity(NamedTuple):
    """What the device is: its kind, and how much of it there is."""

    device_id: int
    queues: int
    config_size: int


class QueueSignal(Protocol):
    """The two notifications of one queue."""

    def kick(self) -> None:
        """Tell the device that there are chains."""

    def rearm(self) -> bool:
        """Be told of used chains from now on; True: there may be some already."""

    async def wait(self) -> None:
        """Wait until told, since `rearm`; raises the error once the device is gone."""


class Transport(Protocol):
    """A virtio device as its driver reaches it.

    Every method that waits raises what the host refuses with, or NoDeviceError once it
    is gone.
    """

    name: str
    space: AddressSpace
    """Our memory, by the addresses that the device knows."""
    config_changed: Wake
    """Rung when the configuration or DEVICE_NEEDS_RESET changed."""

    def config_seen(self) -> None:
        """The change is about to be looked at: ring `config_changed` for the next."""

    async def identify(self) -> Identity:
        """Say what the device is."""

    async def offered(self) -> int:
        """Give the features that the device offers."""

    async def accept(self, features: int) -> None:
        """Tell the device which of them we take."""

    async def status(self) -> int:
        """Read the status."""

    async def set_status(self, value: int) -> int:
        """Write the status; give what it is then. 0 resets: complete on return."""

    async def read_config(self, offset: int, size: int) -> bytes:
        """Read configuration, of one moment."""

    async def write_config(self, offset: int, data: bytes) -> None:
        """Write configuration."""

    async def queue_limit(self, index: int) -> int:
        """Say how many entries a queue can have."""

    async def queue_memory(self, index: int, size: int) -> DmaBuffer:
        """Give a page-aligned piece of memory for the ring of a queue."""

    async def enable_queue(
        self, index: int, entries: int, layout: RingLayout
    ) -> QueueSignal:
        """Let the device use a ring that was laid in `queue_memory`."""

    def allocate(self, size: int, *, alignment: int = 64) -> DmaBuffer:
        """Allocate memory for data, freed when the device is closed."""
