"""QEMU's command line for guests of the daemon, and for the machines of the tests.

Pure: texts in, texts out. What starts a QEMU is `machine.py`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vbus.errors import InvalidError
from vbus.vm.image import GuestImage

Iommu = Literal["intel", "virtio"]

AGENT_PORT = "vbus.agent"
"""The name of the virtio-serial port that the guest's agent looks for."""
MIN_MEMORY_MIB = 128

# Quick to boot in emulation: a random seed at once, nothing probed that is known.
_CPU = "qemu64,+rdrand"
_KERNEL_WORDS = (
    "console=ttyS0 quiet tsc=reliable nokaslr mitigations=off no_timer_check "
    "cryptomgr.notests"
)
_IOMMU_WORDS = {
    "intel": "intel_iommu=on",
    # Its interrupts are not remapped, so vfio has to be told that this is known.
    "virtio": ("guest.modules=virtio-iommu vfio_iommu_type1.allow_unsafe_interrupts=1"),
}


def bridge_device(socket: Path, name: str = "vbus0", **properties: object) -> list[str]:
    """Give the options of one function; only QEMU's JSON form can name a socket.

    `properties` are more of QEMU's, such as bus and addr.
    """
    about = {
        "driver": "vfio-user-pci",
        "id": name,
        "socket": {"type": "unix", "path": str(socket)},
        **properties,
    }
    return ["-device", json.dumps(about, separators=(",", ":"))]


def memory_arguments(memory_mib: int, *, shared: bool = True) -> list[str]:
    """Give the options for the guest's memory; `shared` lets the daemon map it.

    Raises InvalidError.
    """
    if memory_mib < MIN_MEMORY_MIB:
        raise InvalidError(f"{memory_mib} MiB of memory: at least {MIN_MEMORY_MIB}")
    size = f"{memory_mib}M"
    if not shared:
        return ["-m", size, "-machine", "q35"]
    backend = f"memory-backend-memfd,id=mem,size={size},share=on"
    return ["-m", size, "-object", backend, "-machine", "q35,memory-backend=mem"]


def iommu_arguments(iommu: Iommu | None) -> list[str]:
    """Give the options of an IOMMU; they stand before the devices behind it."""
    if iommu == "intel":
        return ["-device", "intel-iommu,intremap=on,caching-mode=on"]
    return ["-device", "virtio-iommu-pci"] if iommu == "virtio" else []


def bridge_arguments(
    socket: Path,
    memory_mib: int = 768,
    iommu: Iommu | None = "intel",
    name: str = "vbus0",
) -> list[str]:
    """Give what a QEMU needs to have a function of the daemon. Raises InvalidError."""
    return [
        *memory_arguments(memory_mib),
        *iommu_arguments(iommu),
        *bridge_device(socket, name),
    ]


def kernel_arguments(
    image: GuestImage, iommu: Iommu | None, words: Sequence[str] = ()
) -> list[str]:
    """Give the options that boot the kernel of an image."""
    line = " ".join(
        filter(None, [_KERNEL_WORDS, _IOMMU_WORDS.get(iommu or ""), *words])
    )
    return [
        *("-kernel", str(image.kernel)),
        *("-initrd", str(image.initramfs)),
        *("-append", line),
    ]


def platform_arguments(accelerator: str, cpus: int) -> list[str]:
    """Give the options of a machine that has nothing but what it is given."""
    # The IOMMU remaps interrupts, which needs them routed by QEMU.
    kvm = accelerator == "kvm"
    return [
        *("-accel", "kvm,kernel-irqchip=split" if kvm else accelerator),
        *("-cpu", "host" if kvm else _CPU),
        *("-smp", str(cpus)),
        *("-nodefaults", "-display", "none"),
    ]


def boot_command(
    qemu: Path,
    image: GuestImage,
    socket: Path,
    memory_mib: int,
    iommu: Iommu | None,
    accelerator: str,
) -> list[str]:
    """Give the whole command of a guest with its console on the terminal."""
    return [
        str(qemu),
        *platform_arguments(accelerator, cpus=2),
        *bridge_arguments(socket, memory_mib, iommu),
        *("-serial", "mon:stdio"),
        *kernel_arguments(image, iommu),
    ]


def root_port_arguments(count: int) -> list[str]:
    """Give PCIe root ports named "port0" and so on, for `device_add` behind them."""
    found = []
    for number in range(count):
        about = f"pcie-root-port,id=port{number},chassis={number + 1},slot={number + 1}"
        found += ["-device", about]
    return found


def channel_arguments(console_fd: int, agent_fd: int, qmp_fd: int) -> list[str]:
    """Give the options that tie console, agent and monitor to open sockets."""
    return [
        *("-chardev", f"socket,id=console,fd={console_fd}"),
        *("-serial", "chardev:console"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,fd={agent_fd}"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}"),
        *("-qmp", "chardev:qmp"),
    ]
