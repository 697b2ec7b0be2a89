"""virtio devices as PCI functions of their own, in every register layout (R20-R27)."""

from backends.virtio.pci.function import VirtioFunction
from backends.virtio.pci.layouts import LAYOUTS, function

__all__ = ["LAYOUTS", "VirtioFunction", "function"]
