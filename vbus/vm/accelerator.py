"""Which of QEMU's accelerators boots the guest's kernel here.

A /dev/kvm that opens is not enough: where KVM emulates every instruction an ordinary
kernel does not get far. So a kernel is booted, once for each boot of this machine.
"""

import os
import subprocess
from pathlib import Path

from vbus.vm import cache
from vbus.vm.image import GuestImage
from vbus.vm.qemu import Qemu

TCG = "tcg,thread=multi"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_KVM = Path("/dev/kvm")
# A kernel without a file to start gets this far in half a second with KVM.
_PROBE_TIMEOUT_S = 8
_GOT_THERE = b"Unable to mount root fs"


def choose(qemu: Qemu, image: GuestImage) -> str:
    """Give "kvm" if the image's kernel boots with it, else emulation."""
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return TCG
    boot_id = _BOOT_ID.read_text().strip()
    name = f"accelerator-{boot_id}-{qemu.version}"

    def make(folder: Path) -> None:
        (folder / "name").write_text("kvm" if _boots(qemu, image) else TCG)

    return (cache.folder(name, make) / "name").read_text()


def _boots(qemu: Qemu, image: GuestImage) -> bool:
    command = [
        *(str(qemu.path), "-accel", "kvm", "-cpu", "host", "-m", "256M"),
        *("-M", "q35", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", "stdio", "-kernel", str(image.kernel)),
        *("-append", "console=ttyS0 panic=-1"),
    ]
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return _GOT_THERE in done.stdout
