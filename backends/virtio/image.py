"""The file or block device behind a virtio disk: reads, writes, durability, holes.

Calls block the thread they are made in. Errors are the kernel's OSError. Nothing here
knows of virtio.
"""

import ctypes
import errno
import fcntl
import os
import resource
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from vbus.errors import (
    BusyError,
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
)
from vbus.virtio.blk import SECTOR

_PAGE: Final = 4096
_BLKGETSIZE64: Final = 0x80081272
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_ZEROES: Final = bytes(1 << 20)
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_int64,
]


def _fallocate(fd: int, mode: int, offset: int, size: int) -> bool:
    """False: this file system cannot. Raises OSError."""
    while _libc.fallocate(fd, mode, offset, size) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def _open(path: Path, read_only: bool) -> int:
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        raise NotFoundError(
            f"{path}: no such file; truncate -s SIZE makes one"
        ) from None
    except PermissionError as error:
        raise PermissionDeniedError(f"{path}: {error.strerror}") from None
    except OSError as error:
        if error.errno != errno.EROFS:
            raise InvalidError(f"{path}: {error.strerror}") from None
        raise PermissionDeniedError(f"{path}: {error.strerror}") from None


def _sleeps() -> int:
    """Count how often this thread waited for something so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class Move(Protocol):
    """Moves `size` bytes between a chain, from `at` on, and a file, as `pwritev`."""

    def __call__(
        self, fd: int, offset: int, at: int, size: int, flags: int, /
    ) -> int: ...


class Pace:
    """Whether to go on with what waits now and then: not soon after it did.

    A pause is twice as long as the last one, and short again once all went well.
    """

    SLOW_S = 0.005
    FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause_s = 0.0
        self._until = float("-inf")

    def good(self) -> bool:
        """May it be tried?"""
        return self._clock() >= self._until

    def learn(self, seconds: float) -> None:
        """It took so long."""
        if seconds < self.SLOW_S:
            self._pause_s = 0.0
            return
        longer = min(2 * self._pause_s, self.LONGEST_PAUSE_S)
        self._pause_s = max(self.FIRST_PAUSE_S, longer)
        self._until = self._clock() + self._pause_s


class DiskImage:
    """An open image, locked against a second writer; a last part sector is left out."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open and lock it.

        Raises NotFoundError, PermissionDeniedError, InvalidError (neither a file nor
        a block device), BusyError (somebody else writes it).
        """
        self.path = path
        self.read_only = read_only
        self._fd = _open(path, read_only)
        try:
            kind = os.fstat(self._fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise InvalidError(f"{path} is neither a file nor a block device")
            how = fcntl.LOCK_SH if read_only else fcntl.LOCK_EX
            fcntl.flock(self._fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise BusyError(f"{path} is in use by another device") from None
        except BaseException:
            os.close(self._fd)
            raise
        self.is_block_device = stat.S_ISBLK(kind)
        self._can_refuse = True
        """RWF_NOWAIT writes work: the kernel says so when one would have to wait."""
        self._pace = Pace()

    def sectors(self) -> int:
        """Ask for the size, in sectors of 512 bytes."""
        if not self.is_block_device:
            return os.fstat(self._fd).st_size // SECTOR
        answer = fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8))
        return int(struct.unpack("Q", answer)[0]) // SECTOR

    def block_size(self) -> int:
        """Ask for the size of a block that is written at once, in bytes."""
        return max(SECTOR, min(os.fstat(self._fd).st_blksize, 4096))

    def fileno(self) -> int:
        """The fd, still owned by the image; -1 once closed."""
        return self._fd

    def write_at_once(self, move: Move, offset: int, at: int, size: int) -> bool:
        """Have `move` write whole pages if the page cache takes them: did it?

        Where the file system cannot say that it would have to wait (ext4, tmpfs), a
        write is tried; one that did wait sends the following ones elsewhere for a
        while. An error is found again by who writes then.
        """
        flags = os.RWF_NOWAIT
        if not self._can_refuse:
            if offset % _PAGE or size % _PAGE or not self._pace.good():
                return False
            flags = 0
        began, slept = time.monotonic(), _sleeps()
        try:
            return move(self._fd, offset, at, size, flags) == size
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and not self.is_block_device:
                self._can_refuse = False
            return False
        finally:
            if not flags:
                waited = _sleeps() != slept  # not only lost the core to others
                self._pace.learn(time.monotonic() - began if waited else 0)

    def read(self, offset: int, size: int) -> bytes:
        """Read; zeros where the file became shorter than the disk was."""
        parts = []
        while size > 0:
            part = os.pread(self._fd, size, offset)
            if not part:
                parts.append(bytes(size))
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:
        """Write all of it; `durable`: on return it is on the medium."""
        rest = memoryview(data)
        flags = os.RWF_DSYNC if durable else 0
        while rest:
            done = os.pwritev(self._fd, [rest], offset, flags)
            rest = rest[done:]
            offset += done

    def flush(self) -> None:
        """Make everything written so far durable."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """Give up the content; where holes cannot be, nothing happens."""
        _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size)

    def write_zeroes(
        self, offset: int, size: int, *, unmap: bool, durable: bool
    ) -> None:
        """Make it read as zeros, as a hole if `unmap`."""
        mode = (_PUNCH_HOLE if unmap else _ZERO_RANGE) | _KEEP_SIZE
        if _fallocate(self._fd, mode, offset, size):
            if durable:
                self.flush()
            return
        while size > 0:
            part = _ZEROES[: min(size, len(_ZEROES))]
            self.write(offset, part, durable=durable)
            offset += len(part)
            size -= len(part)

    def close(self) -> None:
        """Close and unlock it."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
