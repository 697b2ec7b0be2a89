"""QEMU's command line: what it must have for a guest of the daemon."""

import json
import shlex
from pathlib import Path

import pytest

from vbus.errors import InvalidError
from vbus.vm import arguments
from vbus.vm.image import GuestImage

SOCKET = Path("/run/vbus/guests/it's, one.sock")
IMAGE = GuestImage(Path("/i/vmlinux"), Path("/i/initramfs.cpio"))


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_the_guests_memory_is_shared_or_the_daemon_could_not_map_it() -> None:
    words = arguments.bridge_arguments(SOCKET, 512, None)
    assert value_of(words, "-m") == "512M"
    backend = "memory-backend-memfd,id=mem,size=512M,share=on"
    assert value_of(words, "-object") == backend
    assert value_of(words, "-machine") == "q35,memory-backend=mem"


def test_unshared_memory_has_no_backend() -> None:
    words = arguments.memory_arguments(512, shared=False)
    assert "-object" not in words
    assert value_of(words, "-machine") == "q35"


def test_any_path_of_a_socket_survives_json_and_the_shell() -> None:
    """QEMU splits nothing at commas in its JSON form."""
    pasted = shlex.split(shlex.join(arguments.bridge_device(SOCKET)))
    assert json.loads(pasted[1])["socket"] == {"type": "unix", "path": str(SOCKET)}


@pytest.mark.parametrize("iommu", ["intel", "virtio"])
def test_the_iommu_stands_before_the_bridge(iommu: arguments.Iommu) -> None:
    words = arguments.bridge_arguments(SOCKET, 512, iommu)
    units = [number for number, word in enumerate(words) if "iommu" in word]
    assert len(units) == 1
    assert units[0] < len(words) - 1
    assert "vfio-user-pci" in words[-1]


@pytest.mark.parametrize(
    ("iommu", "word"),
    [("intel", "intel_iommu=on"), ("virtio", "guest.modules=virtio-iommu")],
)
def test_the_kernel_is_told_of_the_iommu(iommu: arguments.Iommu, word: str) -> None:
    line = value_of(arguments.kernel_arguments(IMAGE, iommu, ["a=b"]), "-append")
    assert word in line.split()
    assert line.endswith(" a=b")


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(InvalidError, match="64 MiB"):
        arguments.bridge_arguments(SOCKET, 64, None)


def test_kvm_routes_interrupts_where_they_can_be_remapped() -> None:
    words = arguments.platform_arguments("kvm", 2)
    assert value_of(words, "-accel") == "kvm,kernel-irqchip=split"
    assert value_of(arguments.platform_arguments("tcg", 2), "-accel") == "tcg"


def test_each_root_port_has_a_slot_of_its_own() -> None:
    ports = arguments.root_port_arguments(3)[1::2]
    assert len({port.partition("slot=")[2] for port in ports}) == 3
