"""`vbus guest image|qemu`: what it takes to try a guest in a virtual machine."""

from pathlib import Path

import click


def _say(words: str) -> None:
    click.echo(words, err=True)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--package",
    "packages",
    multiple=True,
    metavar="NAME",
    help="A Debian package to put in as well; may be repeated.",
)
def image(folder: Path, packages: tuple[str, ...]) -> None:
    """Make a small bootable guest in DIR: vmlinux and initramfs.cpio.

    Debian's kernel and programs come over the network once and are cached; vbus is
    in it as it stands here.
    """
    from vbus.vm.image import build

    made = build(folder, packages=packages, say=_say)
    click.echo(made.kernel)
    click.echo(made.initramfs)


@click.command()
def qemu() -> None:
    """Print the path of a QEMU that can attach; fetch Debian's if there is none."""
    from vbus.vm.qemu import fetch

    click.echo(fetch(_say).path)
