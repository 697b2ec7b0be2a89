"""Which bridge is meant, and what is said if none can be."""

from pathlib import Path

import pytest

from proxy.linux import uio, vfio
from proxy.linux.function import choose, is_address, open_function
from tests.proxy.linux.sysfs import add_function, bridge, link
from vbus.errors import (
    InvalidError,
    NoDeviceError,
    NotFoundError,
    PermissionDeniedError,
)


@pytest.mark.parametrize("text", ["0000:00:04.0", "00:1f.7", "ABCD:ff:0A.1"])
def test_addresses_are_known(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text", ["/run/g1.sock", "00:04", "00:20.0", "00:04.8", "0:0:04.0", "", "00:04.0 "]
)
def test_what_is_no_address_is_a_path(text: str) -> None:
    assert not is_address(text)


def test_the_only_bridge_needs_no_name(tmp_path: Path) -> None:
    """R61: `vbus guest run` without options."""
    add_function(tmp_path)
    assert choose(None, tmp_path) == bridge(tmp_path)
    for name in ("0000:00:04.0", "00:04.0"):
        assert choose(name, tmp_path) == bridge(tmp_path)


def test_without_a_bridge_the_other_way_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no bridge \(11da:2000\).*run SOCKET"):
        choose(None, tmp_path)


def test_of_several_bridges_one_must_be_chosen(tmp_path: Path) -> None:
    for number in (4, 5):
        add_function(tmp_path, f"0000:00:0{number}.0")
    with pytest.raises(InvalidError, match=r"--device 0000:00:04.0 or 0000:00:05.0"):
        choose(None, tmp_path)
    assert choose("00:05.0", tmp_path).address == "0000:00:05.0"
    with pytest.raises(NotFoundError, match=r"no bridge .* at 0000:00:06.0"):
        choose("00:06.0", tmp_path)


@pytest.fixture
def vfio_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vfio's modules were loaded; no driver takes anything all the same."""
    for name in ("vfio_pci", "vfio_iommu_type1"):
        (tmp_path / "module" / name).mkdir(parents=True)
    (tmp_path / "bus/pci/drivers/vfio-pci").mkdir(parents=True)
    monkeypatch.setattr(vfio, "MODULES", tmp_path / "module")


@pytest.mark.usefixtures("vfio_loaded")
@pytest.mark.parametrize("kind", ["DMA-FQ", "identity"])
async def test_behind_an_iommu_it_is_vfio(tmp_path: Path, kind: str) -> None:
    """R50: physical addresses would be faults there, or reach too much."""
    path = add_function(tmp_path)
    link(path, "iommu_group", "groups/3")
    (path / "iommu_group/type").write_text(f"{kind}\n")
    said: list[str] = []
    with pytest.raises(NotFoundError, match=r"vfio-pci does not take 0000:00:04.0"):
        async with open_function(bridge(tmp_path), 1 << 20, said.append):
            pass
    assert said == ["0000:00:04.0: by vfio (IOMMU group 3)"]
    assert (path / "driver_override").read_text() == "\n"


@pytest.mark.usefixtures("vfio_loaded")
@pytest.mark.parametrize("driver", [None, uio.DRIVER])
async def test_an_iommu_that_does_not_want_the_function_leaves_it_to_uio(
    tmp_path: Path, driver: str | None
) -> None:
    """Some take a function when a driver comes, so one without is offered first."""
    path = add_function(tmp_path)
    (tmp_path / "class/iommu/virtio0").mkdir(parents=True)
    if driver is not None:
        link(path, "driver", f"drivers/{driver}")
    (path / "uio/uio7").rmdir()
    said: list[str] = []
    # It gets as far as it can here.
    with pytest.raises((NotFoundError, NoDeviceError, PermissionDeniedError)):
        async with open_function(bridge(tmp_path), 1 << 20, said.append):
            pass
    assert said == ["0000:00:04.0: by uio (no IOMMU), without interrupts: polled"]
    assert (path / "driver_override").exists() == (driver is None)


async def test_without_vfio_only_an_iommu_that_passes_through_lets_uio_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(name: str) -> None:
        raise NotFoundError(f"modprobe {name} failed")

    monkeypatch.setattr(vfio, "MODULES", tmp_path / "none")
    monkeypatch.setattr(vfio, "load_module", lack)
    path = add_function(tmp_path)
    link(path, "driver", f"drivers/{uio.DRIVER}")
    link(path, "iommu_group", "groups/3")
    (path / "uio/uio7").rmdir()
    said: list[str] = []
    for kind, reason in (("DMA-FQ", "modprobe vfio"), ("identity", "no uio device")):
        (path / "iommu_group/type").write_text(f"{kind}\n")
        with pytest.raises((NotFoundError, NoDeviceError), match=reason):
            async with open_function(bridge(tmp_path), 1 << 20, said.append):
                pass
    (way,) = [line for line in said if "uio" in line]
    assert "the IOMMU passes addresses through, and modprobe vfio_iommu" in way
