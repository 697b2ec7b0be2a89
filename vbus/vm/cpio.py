"""Writing cpio archives as the kernel's initramfs wants them (newc).

Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
Regular files, folders and symbolic links, all root's; no device nodes.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_MAGIC = "070701"
_TRAILER = "TRAILER!!!"
_MAX_BYTES = 0xFFFF_FFFF


def pack(root: Path, out: BinaryIO) -> None:
    """Append the tree under `root` to `out` as one archive, whose end is aligned.

    The kernel unpacks several archives in one file, one over the other. The bytes
    depend on names, modes and contents alone. Raises OSError, ValueError (a file of
    another kind, or of 4 GiB and more).
    """
    for number, path in enumerate(_below(root), 1):
        found = path.lstat()
        name = path.relative_to(root).as_posix()
        if stat.S_ISLNK(found.st_mode):
            target = os.fsencode(path.readlink())
            out.write(_header(name, stat.S_IFLNK | 0o777, number, len(target)))
            out.write(target + _padding(len(target)))
        elif stat.S_ISDIR(found.st_mode):
            out.write(_header(name, found.st_mode, number, 0))
        elif stat.S_ISREG(found.st_mode):
            _write_file(path, _header(name, found.st_mode, number, found.st_size), out)
        else:
            raise ValueError(f"{path}: neither a file nor a folder nor a link")
    out.write(_header(_TRAILER, 0, 0, 0))


def _below(root: Path) -> Iterator[Path]:
    """Walk a tree, each folder before what is in it, in the order of names."""
    for entry in sorted(root.iterdir()):
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from _below(entry)


def _write_file(path: Path, header: bytes, out: BinaryIO) -> None:
    with path.open("rb") as source:
        start = out.tell()
        out.write(header)
        shutil.copyfileobj(source, out, 1 << 20)
        size = out.tell() - start - len(header)
        if size != int(header[54:62], 16):
            raise ValueError(f"{path}: changed while it was packed")
        out.write(_padding(size))


def _header(name: str, mode: int, number: int, size: int) -> bytes:
    if size > _MAX_BYTES:
        raise ValueError(f"{name}: {size} bytes do not fit a cpio archive")
    raw = os.fsencode(name) + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode mode uid gid links mtime size, device and rdev (major, minor), name, check
    fields = (number, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(raw), 0)
    head = (_MAGIC + "".join(f"{field:08x}" for field in fields)).encode()
    return head + raw + _padding(len(head) + len(raw))


def _padding(size: int) -> bytes:
    return bytes(-size % 4)
