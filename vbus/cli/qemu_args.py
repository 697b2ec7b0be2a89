"""`vbus guest qemu-args NAME`: what to give a QEMU so that it is that guest."""

import shlex
from pathlib import Path
from typing import cast

import click

from vbus.cli.asking import ask
from vbus.errors import InvalidError
from vbus.vm import accelerator, arguments, qemu
from vbus.vm.arguments import Iommu
from vbus.vm.image import GuestImage


@click.command("qemu-args")
@click.argument("name")
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(arguments.MIN_MEMORY_MIB),
    default=768,
    show_default=True,
    help="The guest's memory in MiB.",
)
@click.option(
    "--iommu",
    type=click.Choice(["intel", "virtio", "none"]),
    default="intel",
    show_default=True,
    help="The guest's IOMMU; without one there are no MSIs in its user space.",
)
@click.option(
    "--boot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of `vbus guest image`: print the whole command that boots it.",
)
def qemu_args(name: str, memory_mib: int, iommu: str, boot: Path | None) -> None:
    """Print QEMU's options for the guest NAME, ready to paste."""
    socket = Path(ask("guest.show", name=name)[0]["socket"]).absolute()
    unit = None if iommu == "none" else cast(Iommu, iommu)
    if boot is None:
        words = arguments.bridge_arguments(socket, memory_mib, unit)
    else:
        words = _command(boot, socket, memory_mib, unit)
    click.echo(shlex.join(words))


def _command(
    folder: Path, socket: Path, memory_mib: int, iommu: Iommu | None
) -> list[str]:
    image = GuestImage(folder / "vmlinux", folder / "initramfs.cpio")
    if not (image.kernel.is_file() and image.initramfs.is_file()):
        raise InvalidError(f"{folder} has no image: run `vbus guest image {folder}`")
    found = qemu.find()
    if found is None:
        raise InvalidError("no QEMU with vfio-user-pci here: run `vbus guest qemu`")
    accel = accelerator.choose(found, image)
    return arguments.boot_command(found.path, image, socket, memory_mib, iommu, accel)
