"""The register layouts proposed in 2012 for virtio-pci, in conventional slots."""

from vbus.compare.layouts.conventional import Conventional
from vbus.compare.layouts.virtio import LEGACY_BAR, MSIX_BAR, PAGE
from vbus.compare.pci import BarShape, Kind
from vbus.compare.registers import NET_CONFIG, mirrored_bar

_CONFIG_BAR = BarShape(Kind.MEMORY, PAGE)


class FourBar(Conventional):
    """A BAR for each: legacy, common registers, device config, ISR."""

    name = "four-bar"
    title = "four-BAR proposal"
    about = "BARs for legacy, common with the MSI-X table, device config and ISR"
    rows = "R21"
    doorbell = "pio_exit"
    bars = (LEGACY_BAR, MSIX_BAR, _CONFIG_BAR, BarShape(Kind.IO, 4))


class Mirrored(Conventional):
    """The legacy registers, extended, in ports and once more in memory."""

    name = "mirrored"
    title = "mirrored proposal"
    about = "extended legacy registers in ports, a mirror in memory, device config"
    rows = "R22"
    doorbell = "pio_exit"
    bars = (BarShape(Kind.IO, mirrored_bar(NET_CONFIG)), MSIX_BAR, _CONFIG_BAR)


class OffsetsByCapability(Conventional):
    """A vendor capability with one dword per register set."""

    name = "offsets-capability"
    title = "offsets proposal, in a capability"
    about = "the sets share the MSI-X table's BAR; a capability tells where"
    rows = "R23"
    doorbell = "pio_exit"
    bars = (LEGACY_BAR, MSIX_BAR)


class OffsetsByTable(Conventional):
    """A vendor capability that names a BAR, and a table at its offset 0."""

    name = "offsets-table"
    title = "offsets proposal, in a table"
    about = "a BAR of its own begins with the table of offsets"
    rows = "R23"
    doorbell = "pio_exit"
    bars = (LEGACY_BAR, MSIX_BAR, BarShape(Kind.MEMORY, PAGE))
