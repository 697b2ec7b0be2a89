"""A folder that looks like sysfs to us, with bridges in it."""

from pathlib import Path

from proxy.linux.devices import PciDevice, find
from vbus import abi

ADDRESS = "0000:00:04.0"
RESOURCES = """\
0x00000000febd0000 0x00000000febd003f 0x0000000000040200
0x000000000000c040 0x000000000000c05f 0x0000000000040101
0x0000000000000000 0x0000000000000000 0x0000000000000000
"""


def add_function(
    root: Path,
    address: str = ADDRESS,
    vendor: int = abi.VENDOR_ID,
    device: int = abi.DEVICE_ID,
) -> Path:
    """Add a function with the bridge's BARs and uio device; give its folder."""
    path = root / "bus/pci/devices" / address
    (path / "uio/uio7").mkdir(parents=True)
    (root / "dev").mkdir(exist_ok=True)
    (root / "dev/uio7").touch()
    (path / "vendor").write_text(f"{vendor:#06x}\n")
    (path / "device").write_text(f"{device:#06x}\n")
    (path / "resource").write_text(RESOURCES)
    config = bytearray(256)
    config[0:4] = vendor.to_bytes(2, "little") + device.to_bytes(2, "little")
    (path / "config").write_bytes(config)
    (path / "resource0").write_bytes(bytes(range(64)))
    (path / "resource1").write_bytes(bytes(32))
    return path


def link(path: Path, name: str, target: str) -> None:
    """Link to something in the tree, as sysfs does to a driver."""
    goal = path.parent.parent / target
    goal.mkdir(parents=True, exist_ok=True)
    (path / name).symlink_to(goal)


def bridge(root: Path) -> PciDevice:
    (found,) = find(abi.VENDOR_ID, abi.DEVICE_ID, root)
    return found
