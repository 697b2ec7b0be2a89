"""Functions in sysfs: found, described, bound. Against a folder that looks like it."""

from pathlib import Path

import pytest

from proxy.linux.devices import PciDevice, Resource, find
from tests.proxy.linux.sysfs import ADDRESS, add_function, bridge, link
from vbus import abi
from vbus.errors import BusyError, NoDeviceError, NotFoundError

IDS = abi.VENDOR_ID, abi.DEVICE_ID
DRIVER = "uio_pci_generic"


def refuse_to_load(name: str) -> None:
    raise NotFoundError(f"modprobe {name} failed")


def test_functions_are_found_by_their_ids_in_order(tmp_path: Path) -> None:
    """R1: whatever else is on the bus."""
    add_function(tmp_path, "0000:01:00.0")
    add_function(tmp_path, "0000:00:05.0")
    add_function(tmp_path, "0000:00:02.0", vendor=0x8086)
    add_function(tmp_path, "0000:00:03.0", device=0x2001)
    addresses = [device.address for device in find(*IDS, tmp_path)]
    assert addresses == ["0000:00:05.0", "0000:01:00.0"]


def test_a_function_that_leaves_while_we_look_is_not_found(tmp_path: Path) -> None:
    (add_function(tmp_path) / "device").unlink()
    assert find(*IDS, tmp_path) == []


def test_bars_are_told_with_place_size_and_kind(tmp_path: Path) -> None:
    add_function(tmp_path)
    assert bridge(tmp_path).bars() == {
        0: Resource(0xFEBD0000, 64, io=False),
        1: Resource(0xC040, 32, io=True),
    }


def test_driver_and_group_are_told(tmp_path: Path) -> None:
    path = add_function(tmp_path)
    device = bridge(tmp_path)
    assert (device.driver, device.iommu_group) == (None, None)
    link(path, "driver", "drivers/vfio-pci")
    link(path, "iommu_group", "groups/12")
    assert (device.driver, device.iommu_group) == ("vfio-pci", "12")


def test_what_is_bound_already_stays(tmp_path: Path) -> None:
    path = add_function(tmp_path)
    link(path, "driver", f"drivers/{DRIVER}")
    bridge(tmp_path).bind(DRIVER, DRIVER, refuse_to_load)
    assert not (path / "driver_override").exists()


def test_the_driver_of_somebody_else_is_not_taken_away(tmp_path: Path) -> None:
    path = add_function(tmp_path)
    link(path, "driver", "drivers/other")
    with pytest.raises(BusyError, match=r"bound to other; run: echo .*/driver/unbind"):
        bridge(tmp_path).bind(DRIVER, DRIVER, refuse_to_load)


def test_binding_loads_the_module_only_if_the_driver_is_not_there(
    tmp_path: Path,
) -> None:
    path = add_function(tmp_path)
    device = bridge(tmp_path)
    with pytest.raises(NotFoundError, match="modprobe uio_pci_generic failed"):
        device.bind(DRIVER, DRIVER, refuse_to_load)
    (tmp_path / "bus/pci/drivers" / DRIVER).mkdir(parents=True)
    with pytest.raises(NotFoundError, match=r"does not take 0000:00:04.0: dmesg"):
        device.bind(DRIVER, DRIVER, refuse_to_load)
    assert (path / "driver_override").read_text() == DRIVER
    assert (tmp_path / "bus/pci/drivers_probe").read_text() == ADDRESS


def test_a_function_without_folder_is_gone(tmp_path: Path) -> None:
    device = PciDevice(ADDRESS, tmp_path / "bus/pci/devices" / ADDRESS)
    with pytest.raises(NoDeviceError, match=r"0000:00:04.0: No such file"):
        device.bars()


def test_a_released_function_is_free_for_every_driver(tmp_path: Path) -> None:
    path = add_function(tmp_path)
    device = bridge(tmp_path)
    (path / "driver_override").write_text(DRIVER)
    device.release()  # it has no driver: nothing to unbind
    assert (path / "driver_override").read_text() == "\n"
    link(path, "driver", f"drivers/{DRIVER}")
    device.release()
    assert (path / "driver/unbind").read_text() == ADDRESS


def test_an_iommu_of_the_machine_is_seen(tmp_path: Path) -> None:
    add_function(tmp_path)
    assert not bridge(tmp_path).machine_has_iommu
    (tmp_path / "class/iommu/dmar0").mkdir(parents=True)
    assert bridge(tmp_path).machine_has_iommu
