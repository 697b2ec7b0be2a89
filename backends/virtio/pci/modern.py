"""The registers of virtio 1.x (R24; virtio 1.2, 4.1.4): what Linux binds to."""

from typing import Any

from backends.virtio.constants import Ring
from backends.virtio.pci.registers import Register, SelectedFeatures, halves
from backends.virtio.pci.transport import Mode
from vbus.errors import InvalidError

_WORD = 0xFFFF_FFFF


def _half(part: str, shift: int) -> property:
    """Make the attribute of one half of an address of the selected queue."""

    def get(self: SelectedFeatures) -> int:
        whole = self.device.of_queue(lambda queue: int(getattr(queue.setup, part)))
        return whole >> shift & _WORD

    def put(self: SelectedFeatures, value: int) -> None:
        queue = self.device.selected
        whole: int = getattr(queue.setup, part)
        address: Any = {part: whole & ~(_WORD << shift) | value << shift}
        queue.set_up(**address)

    return property(get, put)


class CommonRegisters(SelectedFeatures):
    """struct virtio_pci_common_cfg (4.1.4.3)."""

    TABLE = (
        Register("device_feature_select", 4),
        Register("device_feature", 4, "r"),
        Register("driver_feature_select", 4),
        Register("driver_feature", 4),
        Register("config_vector", 2),
        Register("num_queues", 2, "r"),
        Register("status", 1),
        Register("config_generation", 1, "r"),
        Register("queue_select", 2),
        Register("queue_size", 2),
        Register("queue_vector", 2),
        Register("queue_enable", 2),
        Register("queue_notify_off", 2, "r"),
        *halves("queue_desc"),
        *halves("queue_driver"),
        *halves("queue_device"),
        Register("queue_notify_data", 2, "r"),
        Register("queue_reset", 2),
    )
    mode = Mode.MODERN

    queue_desc_lo, queue_desc_hi = _half("desc", 0), _half("desc", 32)
    queue_driver_lo, queue_driver_hi = _half("driver", 0), _half("driver", 32)
    queue_device_lo, queue_device_hi = _half("device", 0), _half("device", 32)

    @property
    def num_queues(self) -> int:
        return len(self.device.device.queues)

    @property
    def config_generation(self) -> int:
        return self.device.device.config.generation

    @property
    def queue_size(self) -> int:
        return self.device.of_queue(lambda queue: queue.setup.size)

    @queue_size.setter
    def queue_size(self, size: int) -> None:
        self.device.selected.set_up(size=size, packed=self.device.packed)

    @property
    def queue_enable(self) -> int:
        return self.device.of_queue(lambda queue: queue.enabled)

    @queue_enable.setter
    def queue_enable(self, value: int) -> None:
        if value != 1:
            raise InvalidError("a queue is disabled by a reset only (4.1.4.3.2)")
        self.device.device.enable_queue(self.device.selected.index)

    @property
    def queue_notify_off(self) -> int:
        return self.queue_select

    @property
    def queue_notify_data(self) -> int:
        return self.queue_select

    @property
    def queue_reset(self) -> int:
        """A reset is complete when the write returns, so it never is under way."""
        return 0

    @queue_reset.setter
    def queue_reset(self, value: int) -> None:
        if value != 1 or not self.device.device.has(Ring.RESET):
            raise InvalidError("RING_RESET was not negotiated")
        self.device.reset_queue()
