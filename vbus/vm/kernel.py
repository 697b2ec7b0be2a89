"""Getting the kernel's ELF file out of a bzImage: QEMU boots it sooner (PVH).

Header fields: the kernel's Documentation/arch/x86/boot.rst, "The real-mode kernel
header". Not a loader.
"""

import lzma
import struct
import subprocess
import zlib
from collections.abc import Sequence

from vbus.errors import InvalidError

_SECTOR = 512
_SETUP_SECTORS = 0x1F1  # one byte: sectors after the first that are real-mode code
_PAYLOAD = 0x248  # two 32-bit words: offset in the protected-mode code, length
_ELF = b"\x7fELF"


def extract_vmlinux(bz_image: bytes, zstd: Sequence[str]) -> bytes:
    """Give the ELF file. `zstd` starts that program. Raises InvalidError."""
    if len(bz_image) < _PAYLOAD + 8:
        raise InvalidError(f"no bzImage: {len(bz_image)} bytes")
    offset, length = struct.unpack_from("<II", bz_image, _PAYLOAD)
    start = (bz_image[_SETUP_SECTORS] + 1) * _SECTOR + offset
    found = _decompress(bz_image[start : start + length], zstd)
    if not found.startswith(_ELF):
        raise InvalidError("the kernel is packed neither by zstd nor gzip nor xz")
    return found


def _decompress(packed: bytes, zstd: Sequence[str]) -> bytes:
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        # The last four bytes are the size; zstd takes them for a broken frame.
        done = subprocess.run(
            [*zstd, "-dcq"], input=packed[:-4], check=False, capture_output=True
        )
        return done.stdout
    if packed.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(packed)
    if packed.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(packed)
    return b""
