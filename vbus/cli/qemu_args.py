"""`vbus guest|device qemu-args NAME`: what to give a QEMU so that it has a function.

A guest's is the bridge; a device's is its own, where it is exposed so.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click

from vbus.cli.asking import ask
from vbus.errors import InvalidError
from vbus.vm import accelerator, arguments, qemu
from vbus.vm.arguments import Iommu
from vbus.vm.image import GuestImage

_memory = click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(arguments.MIN_MEMORY_MIB),
    default=768,
    show_default=True,
    help="The guest's memory in MiB.",
)


def _iommu(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--iommu",
        type=click.Choice(["intel", "virtio", "none"]),
        default=default,
        show_default=True,
        help="The guest's IOMMU; without one there are no MSIs in its user space.",
    )


def _unit(iommu: str) -> Iommu | None:
    return None if iommu == "none" else cast(Iommu, iommu)


@click.command("qemu-args")
@click.argument("name")
@_memory
@_iommu("intel")
@click.option(
    "--boot",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of `vbus guest image`: print the whole command that boots it.",
)
def qemu_args(name: str, memory_mib: int, iommu: str, boot: Path | None) -> None:
    """Print QEMU's options for the guest NAME, ready to paste."""
    socket = Path(ask("guest.show", name=name)[0]["socket"]).absolute()
    unit = _unit(iommu)
    if boot is None:
        words = arguments.bridge_arguments(socket, memory_mib, unit)
    else:
        words = _command(boot, socket, memory_mib, unit)
    click.echo(shlex.join(words))


@click.command("qemu-args")
@click.argument("name")
@_memory
@_iommu("none")
@click.option(
    "--add",
    is_flag=True,
    help="Only the device: memory and IOMMU are on the command line already.",
)
def device_qemu_args(name: str, memory_mib: int, iommu: str, add: bool) -> None:
    """Print QEMU's options for the device NAME, if it is exposed by pci."""
    shown = ask("device.show", name=name)[0]
    if shown["expose"] != "pci":
        raise InvalidError(f"{name} is not exposed by pci: its guests have qemu-args")
    socket = Path(shown["socket"]).absolute()
    ident = f"vbus-{name}"
    if add:
        words = arguments.bridge_device(socket, ident)
    else:
        words = arguments.bridge_arguments(socket, memory_mib, _unit(iommu), ident)
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
