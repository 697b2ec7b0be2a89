"""The guest to try things out in: a kernel and an initramfs with the working tree.

Two archives in one file: Debian's programs (made once, `base.py`) and the tree as it
stands (`tree.py`, remade in about a second when it changed). What boots it is
`machine.py`; what it does then is in `guest/`.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vbus.vm import base, cache, cpio, debian, elf, kernel, tree
from vbus.vm.cache import Say, silent

# A bench compares two trees at most; a few more cost disk and nothing else.
_KEPT_IMAGES, _KEPT_BASES = 4, 3


@dataclass(frozen=True)
class GuestImage:
    """What QEMU boots: `-kernel` (an ELF file, by PVH) and `-initrd` (not packed)."""

    kernel: Path
    initramfs: Path


def cached(
    say: Say = silent, *, packages: Sequence[str] = (), guest: Path = tree.GUEST
) -> GuestImage:
    """Give the image of the working tree as it is now, from the cache or made.

    `packages` are Debian packages beyond ours; `guest` is the folder of `init` and
    `agent.py`. Raises UnavailableError (no network and nothing cached), OSError.
    """
    debian.require_amd64()
    made_of = base.recipe(packages)
    base_name = f"guest-base-{_digest_of_recipe(made_of)}"
    base_folder = cache.folder(base_name, lambda f: base.make(f, made_of, say), say)
    found = tree.entries(guest)
    name = f"guest-image-{base_name[-8:]}-{tree.digest(found)}"
    place = cache.folder(name, lambda f: _make(f, base_folder, found, say), say)
    cache.prune("guest-image-", _KEPT_IMAGES)
    cache.prune("guest-base-", _KEPT_BASES)
    return GuestImage(base_folder / "vmlinux", place / "initramfs.cpio")


def build(
    folder: Path, *, packages: Sequence[str] = (), say: Say = silent
) -> GuestImage:
    """Put `vmlinux` and `initramfs.cpio` into a folder. Raises as `cached` does."""
    made = cached(say, packages=packages)
    folder.mkdir(parents=True, exist_ok=True)
    return GuestImage(_copy(made.kernel, folder), _copy(made.initramfs, folder))


def _digest_of_recipe(made_of: base.Recipe) -> str:
    """Name a base by all that it depends on, the code that makes it included."""
    state = hashlib.sha256(repr(made_of).encode())
    for module in (base, cpio, debian, elf, kernel):
        state.update(Path(str(module.__file__)).read_bytes())
    return state.hexdigest()[:16]


def _make(fresh: Path, base_folder: Path, found: list[tree.Entry], say: Say) -> None:
    say("packing the working tree")
    root = fresh / "root"
    tree.write(found, root)
    base.compile_python(
        base_folder / "root", [root / base.SITE], keep_source=True, home=root
    )
    with (fresh / "initramfs.cpio").open("wb") as out:
        with (base_folder / "base.cpio").open("rb") as source:
            shutil.copyfileobj(source, out, 1 << 20)
        cpio.pack(root, out)
    shutil.rmtree(root)


def _copy(source: Path, folder: Path) -> Path:
    """Copy a file so that its place has the old one or the whole new one."""
    fd, name = tempfile.mkstemp(prefix=f".{source.name}.", dir=folder)
    os.close(fd)
    try:
        shutil.copyfile(source, name)
        os.chmod(name, 0o644)
        return Path(name).rename(folder / source.name)
    except BaseException:
        Path(name).unlink()
        raise
