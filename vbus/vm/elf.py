"""Which shared libraries programs need, by their dynamic sections (ELF-64).

Enough of ELF to leave libraries out of an image that nothing in it loads.
"""

import struct
from pathlib import Path

from vbus.vm.debian import LIBRARIES

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5
# Loaded by name while a program runs: name look-up, and threads that are cancelled.
_BY_NAME = ("libnss_files.so.2", "libnss_dns.so.2", "libgcc_s.so.1")


def needed(path: Path) -> list[str]:
    """Give the names of the libraries that a program or library asks for."""
    image = path.read_bytes()
    if not image.startswith(_MAGIC):
        return []
    table, size, count = _program_headers(image)
    loads, entries = [], []
    for at in range(table, table + size * count, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", image, at)
        if kind == _PT_LOAD:
            loads.append((address, offset, length))
        elif kind == _PT_DYNAMIC:
            raw = image[offset : offset + length - length % 16]
            entries = list(struct.iter_unpack("<QQ", raw))
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
    base = next((o + strings - a for a, o, n in loads if a <= strings < a + n), None)
    if base is None:
        return []
    return [_string(image, base + value) for tag, value in entries if tag == _DT_NEEDED]


def _program_headers(image: bytes) -> tuple[int, int, int]:
    (table,) = struct.unpack_from("<Q", image, 0x20)
    size, count = struct.unpack_from("<HH", image, 0x36)
    return table, size, count


def _string(image: bytes, at: int) -> str:
    return image[at : image.index(b"\0", at)].decode()


def keep_needed_libraries(root: Path) -> None:
    """Delete the libraries that no program and no Python extension of `root` needs."""
    folder = root / LIBRARIES
    libraries = {path.name: path for path in folder.glob("*.so*")}
    users = [path for path in root.rglob("*") if path.is_file()]
    waiting = [path for path in users if path.parent != folder]
    names = list(_BY_NAME)
    kept: set[str] = {"ld-linux-x86-64.so.2"}
    while waiting or names:
        while waiting:
            names += needed(waiting.pop())
        name = names.pop() if names else ""
        if name in libraries and name not in kept:
            kept.add(name)
            waiting.append(libraries[name])
    kept |= {libraries[name].resolve().name for name in kept if name in libraries}
    for name in libraries.keys() - kept:
        libraries[name].unlink()
