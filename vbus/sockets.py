"""Unix sockets of a daemon: made safely, taken over when stale, and who connects."""

import grp
import os
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import trio

from vbus.errors import BusyError, ExistsError, InvalidError

BACKLOG = 64
MODE = 0o600
_UCRED = struct.Struct("iII")
_SO_PEERGROUPS = 59
_GROUPS_SIZE = 1024


class Peer(NamedTuple):
    """Who is at the other end of a socket (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket | trio.socket.SocketType) -> Peer:
    """Ask the kernel who connected."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    assert isinstance(raw, bytes)
    return Peer(*_UCRED.unpack(raw))


@dataclass(frozen=True)
class Access:
    """Who may use a socket of management: root, our own user, and maybe a group."""

    gid: int | None = None

    @classmethod
    def of_group(cls, name: str | None) -> Self:
        """Let the members of a group in too. Raises InvalidError: there is none."""
        if name is None:
            return cls()
        try:
            return cls(grp.getgrnam(name).gr_gid)
        except KeyError:
            raise InvalidError(f"no group {name!r} on this machine") from None

    def grant(self, path: Path) -> None:
        """Let the group through at a socket, or a folder. Raises OSError."""
        if self.gid is not None:
            os.chown(path, -1, self.gid)
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode & stat.S_IRWXU) >> 3)

    def allows(self, sock: socket.socket | trio.socket.SocketType) -> bool:
        """Check who connected: the file's mode may have been changed."""
        peer = peer_of(sock)
        if peer.uid in (0, os.geteuid()):
            return True
        return self.gid is not None and self.gid in (peer.gid, *_groups_of(sock))


def _groups_of(sock: socket.socket | trio.socket.SocketType) -> tuple[int, ...]:
    """Give the peer's supplementary groups; none if it has more than we can ask for."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:
        return ()
    assert isinstance(raw, bytes)
    return struct.unpack(f"={len(raw) // 4}I", raw)


def listen(path: Path, owner_uid: int | None = None) -> socket.socket:
    """Listen on `path`, mode 0600, given to `owner_uid` (default: our own user).

    A socket that nobody answers on is replaced. Raises BusyError if somebody does,
    ExistsError if what is there is no socket, or OSError.
    """
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        # Linux makes the socket's file with the mode of the descriptor, so at no
        # time can anybody else open it.
        os.fchmod(listener.fileno(), MODE)
        listener.bind(str(path))
        try:
            if owner_uid not in (None, os.geteuid()):
                os.chown(path, owner_uid, -1)
            listener.listen(BACKLOG)
        except OSError:
            path.unlink()
            raise
    except BaseException:
        listener.close()
        raise
    return listener


def unlinker(path: Path) -> Callable[[], None]:
    """Give what removes the socket that is at `path` now, and no later one."""
    identity = os.stat(path)

    def unlink() -> None:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), identity):
                path.unlink()

    return unlink


def _remove_stale(path: Path) -> None:
    """Remove a socket that a dead server left behind, nothing else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ExistsError(f"{path} is there and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise BusyError(f"another server answers on {path}")
