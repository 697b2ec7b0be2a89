"""The register layouts by name: how each shows a device through configuration space.

| layout | what it is |
|---|---|
| modern | virtio 1.x: capabilities say where each set of registers is (R24) |
| draft | the same with the capability format of 2012: 16 bits of offset |
| legacy, legacy-intx | ports only, with MSI-X and without (R20) |
| transitional | legacy's ports and modern's capabilities |
| four-bar, four-bar-command | ports, registers, configuration, ISR: a BAR each (R21) |
| mirrored | legacy's registers and more, as ports and as memory (R22) |
| offsets, offsets-table | where each set is: in a capability, or in a table (R23) |

MSI-X has a BAR of its own in all of them: BAR 1, or 4 where 1 is taken.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from backends.virtio.constants import Ring, bits
from backends.virtio.device import VirtioDevice
from backends.virtio.pci import legacy
from backends.virtio.pci.function import (
    Area,
    VirtioFunction,
    identity,
    msix_for,
)
from backends.virtio.pci.legacy import LegacyPorts
from backends.virtio.pci.modern import CommonRegisters
from backends.virtio.pci.proposals import (
    SEPARATE_CONFIG,
    ConfigCommands,
    MirroredPorts,
    MirroredRegisters,
    ProposedRegisters,
)
from backends.virtio.pci.registers import (
    DeviceConfig,
    FixedWindow,
    IsrWindow,
    NotifyWindow,
)
from backends.virtio.pci.transport import Mode
from vbus.errors import InvalidError
from vbus.pci.config_space import Bar, ConfigSpace, Msix, Vendor

_PAGE: Final = 4096
_INTA: Final = 1
_PORTS: Final = Bar(256, io=True)
_SET: Final = Bar(_PAGE)

COMMON, NOTIFY, ISR, DEVICE, PCI_ACCESS = range(1, 6)
"""Types of capabilities (4.1.4)."""

_CAPABILITY: Final = struct.Struct("<BBBHII")
"""cfg_type, bar, id, padding, offset, length."""
_DRAFT: Final = struct.Struct("<BBBHI")
"""cfg_type, bar, padding, offset, length: the format of 2012."""
_WRITABLE: Final = _CAPABILITY.pack(0, 0xFF, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF) + b"\xff" * 4
_MODERN_BAR: Final = 4
_PRESENT: Final = 1 << 31


def _base(device: VirtioDevice, bar: int = 1) -> tuple[Msix, dict[int, Bar]]:
    msix, table = msix_for(device, bar)
    return msix, {bar: table}


def _config(
    device: VirtioDevice,
    bars: Mapping[int, Bar],
    capabilities: Sequence[Msix | Vendor],
    *,
    modern: bool = False,
) -> ConfigSpace:
    ids = identity(device.device_id, modern=modern)
    return ConfigSpace(ids, bars, capabilities, interrupt_pin=_INTA)


def _ports_area(function: VirtioFunction) -> Area:
    ports = LegacyPorts(function.transport)
    return Area(0, 0, _PORTS.size, ports, kicks=legacy.NOTIFY)


# Modern and transitional


def _places(device: VirtioDevice) -> dict[int, tuple[int, int]]:
    """Give offset and length of each part of the modern BAR, by capability type."""
    slots = NotifyWindow.MULTIPLIER * len(device.queues)
    return {
        COMMON: (0, CommonRegisters.length),
        ISR: (_PAGE, 1),
        DEVICE: (2 * _PAGE, max(device.config.size, 4)),
        NOTIFY: (3 * _PAGE, slots),
    }


def _standard(device: VirtioDevice) -> list[Vendor]:
    """The capabilities of virtio 1.x, notifications with their multiplier."""
    found = []
    for kind, (offset, length) in _places(device).items():
        data = _CAPABILITY.pack(kind, _MODERN_BAR, 0, 0, offset, length)
        if kind == NOTIFY:
            data += struct.pack("<I", NotifyWindow.MULTIPLIER)
        found.append(Vendor(data))
    return found


def _drafted(device: VirtioDevice) -> list[Vendor]:
    """The same in the format of 2012, where slots are four bytes apart by rule."""
    return [
        Vendor(_DRAFT.pack(kind, _MODERN_BAR, 0, offset, length))
        for kind, (offset, length) in _places(device).items()
    ]


def _modern_areas(function: VirtioFunction) -> list[Area]:
    device, places = function.transport, _places(function.transport.device)
    stride = NotifyWindow.MULTIPLIER
    return [
        Area(_MODERN_BAR, *places[COMMON], CommonRegisters(device)),
        Area(_MODERN_BAR, *places[ISR], IsrWindow(device)),
        Area(_MODERN_BAR, *places[DEVICE], DeviceConfig(device, Mode.MODERN)),
        Area(_MODERN_BAR, *places[NOTIFY], NotifyWindow(device), 0, stride),
    ]


def _modern_bar(device: VirtioDevice) -> Bar:
    offset, length = _places(device)[NOTIFY]
    return Bar(1 << (offset + length - 1).bit_length())


def modern(device: VirtioDevice) -> VirtioFunction:
    """virtio 1.x alone."""
    return _with_capabilities(device, _standard(device))


def draft(device: VirtioDevice) -> VirtioFunction:
    """virtio 1.x's registers behind capabilities as drafted in 2012."""
    return _with_capabilities(device, _drafted(device), access=False)


def _with_capabilities(
    device: VirtioDevice, sets: Sequence[Vendor], *, access: bool = True
) -> VirtioFunction:
    msix, bars = _base(device)
    bars[_MODERN_BAR] = _modern_bar(device)
    window = _access() if access else None
    capabilities: list[Msix | Vendor] = [msix, *sets]
    if window is not None:
        capabilities.append(window)
    config = _config(device, bars, capabilities, modern=True)
    features = bits(Ring.ACCESS_PLATFORM)
    function = VirtioFunction(device, config, features=features, access=window)
    function.show(_modern_areas(function))
    return function


def _access() -> Vendor:
    head = _CAPABILITY.pack(PCI_ACCESS, 0, 0, 0, 0, 0)
    return Vendor(head + bytes(4), _WRITABLE)


def transitional(device: VirtioDevice) -> VirtioFunction:
    """Legacy's ports, and virtio 1.x beside them."""
    msix, bars = _base(device)
    bars |= {0: _PORTS, _MODERN_BAR: _modern_bar(device)}
    window = _access()
    config = _config(device, bars, [msix, *_standard(device), window])
    features = bits(Ring.ACCESS_PLATFORM)
    function = VirtioFunction(device, config, features=features, access=window)
    function.show([_ports_area(function), *_modern_areas(function)])
    return function


# Legacy


def legacy_msix(device: VirtioDevice) -> VirtioFunction:
    """Ports, and MSI-X, which moves the configuration while it is enabled."""
    msix, bars = _base(device)
    config = _config(device, bars | {0: _PORTS}, [msix])
    function = VirtioFunction(device, config)
    function.show([_ports_area(function)])
    return function


def legacy_intx(device: VirtioDevice) -> VirtioFunction:
    """Ports only."""
    function = VirtioFunction(device, _config(device, {0: _PORTS}, []))
    function.show([_ports_area(function)])
    return function


# The proposals of 2012


def four_bar(device: VirtioDevice) -> VirtioFunction:
    """R21, with a commit latch for a device that has one."""
    return _four_bars(device, commands=False)


def four_bar_command(device: VirtioDevice) -> VirtioFunction:
    """R21 with the configuration behind a command register (R25)."""
    return _four_bars(device, commands=True)


def _four_bars(device: VirtioDevice, *, commands: bool) -> VirtioFunction:
    msix, bars = _base(device, 4)
    bars |= {0: _PORTS, 1: _SET, 2: _SET, 3: Bar(16)}
    function = VirtioFunction(device, _config(device, bars, [msix]))
    shown = function.transport
    config = ConfigCommands(shown) if commands else DeviceConfig(shown, Mode.MODERN)
    function.show(
        [
            _ports_area(function),
            Area(1, 0, ProposedRegisters.length, ProposedRegisters(shown)),
            Area(2, 0, _PAGE, config),
            Area(3, 0, IsrWindow.length, IsrWindow(shown)),
        ]
    )
    return function


def mirrored(device: VirtioDevice) -> VirtioFunction:
    """R22."""
    msix, bars = _base(device, 4)
    bars |= {0: _PORTS, 1: _SET, 2: _SET}
    features = bits(SEPARATE_CONFIG)
    function = VirtioFunction(device, _config(device, bars, [msix]), features=features)
    shown = function.transport
    function.show(
        [
            Area(0, 0, _PORTS.size, MirroredPorts(shown), kicks=legacy.NOTIFY),
            Area(
                1,
                0,
                MirroredRegisters.length,
                MirroredRegisters(shown),
                kicks=legacy.NOTIFY,
            ),
            Area(2, 0, _PAGE, DeviceConfig(shown)),
        ]
    )
    return function


def offsets(device: VirtioDevice) -> VirtioFunction:
    """R23 (a): a capability with a word for each set; the ISR stays legacy's."""
    common, config = (2, 0), (2, _PAGE // 2)
    words = [
        _PRESENT | bar << 24 | at
        for bar, at in ((0, 0), common, config, (0, legacy.ISR))
    ]
    pad = b"\0"
    return _with_sets(device, Vendor(pad + struct.pack("<4I", *words)), 0)


def offsets_table(device: VirtioDevice) -> VirtioFunction:
    """R23 (b): a capability that names a BAR, where a table begins with its count."""
    return _with_sets(device, Vendor(bytes([2])), _TABLE.size)


_TABLE: Final = struct.Struct("<III")
"""count, common offset, config offset."""


def _with_sets(device: VirtioDevice, capability: Vendor, common: int) -> VirtioFunction:
    msix, bars = _base(device)
    bars |= {0: _PORTS, 2: _SET}
    function = VirtioFunction(device, _config(device, bars, [msix, capability]))
    shown, config = function.transport, _PAGE // 2
    function.show(
        [
            _ports_area(function),
            Area(2, common, ProposedRegisters.length, ProposedRegisters(shown)),
            Area(2, config, _PAGE - config, DeviceConfig(shown, Mode.MODERN)),
        ]
    )
    if common:
        table = FixedWindow(_TABLE.pack(2, common, config))
        function.show([Area(2, 0, _TABLE.size, table)])
    return function


LAYOUTS: Final[Mapping[str, Callable[[VirtioDevice], VirtioFunction]]] = {
    "modern": modern,
    "draft": draft,
    "legacy": legacy_msix,
    "legacy-intx": legacy_intx,
    "transitional": transitional,
    "four-bar": four_bar,
    "four-bar-command": four_bar_command,
    "mirrored": mirrored,
    "offsets": offsets,
    "offsets-table": offsets_table,
}


def function(
    device: VirtioDevice, layout: str, *, spin_us: float = 0
) -> VirtioFunction:
    """Show a device as a PCI function of its own.

    With `spin_us` a queue looks for requests up to that long before it sleeps, while
    that pays off: the guest then need not notify it, which costs it an exit.
    Raises InvalidError: there is no such layout, or the device is shown elsewhere.
    """
    try:
        make = LAYOUTS[layout]
    except KeyError:
        known = ", ".join(LAYOUTS)
        raise InvalidError(f"no layout {layout!r}: there are {known}") from None
    shown = make(device)
    device.spin_us = spin_us
    return shown
