"""Unix sockets of a daemon: made safely, taken over when stale, and who connects.

`Listeners` has them outlive the daemon: whoever connects meanwhile waits, unrefused,
until the next daemon takes the same socket up.
"""

import grp
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import trio

from vbus.errors import BusyError, ExistsError, InvalidError
from vbus.service.inherited import UNNAMED, Inherited

logger = logging.getLogger(__name__)

BACKLOG = 64
MODE = 0o600
STORED = "vbus/"
"""How the names begin of the sockets that we gave to be kept."""
_ACCEPTCON = 0x10000
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
    remove_stale(path)
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


def remove_stale(path: Path) -> None:
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
        except PermissionError:
            # A guest's, of another user, which we may not ask; the kernel may say.
            if not _listens(path):
                path.unlink()
                return
        except BlockingIOError:
            pass
    raise BusyError(f"another server answers on {path}")


def _listens(path: Path) -> bool:
    """Does a socket of that name listen? See /proc/net/unix in proc(5)."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    entries = [line.split(maxsplit=7) for line in lines]
    flags = [int(entry[3], 16) for entry in entries if entry[7:] == [str(path)]]
    return any(word & _ACCEPTCON for word in flags)


class Keeper(Protocol):
    """Who has our descriptors while no daemon runs: the service manager."""

    def store(self, name: str, *fds: int) -> None:
        """Keep descriptors for the next daemon."""

    def forget(self, name: str) -> None:
        """Close what is kept by that name."""


class Listener(NamedTuple):
    """A listening socket. Who asked for it owns it, and closes it."""

    sock: socket.socket
    unlink: Callable[[], None]

    def close(self) -> None:
        """Stop listening; its file goes too, unless somebody keeps the socket."""
        self.sock.close()
        self.unlink()


@dataclass
class _Kept:
    """A socket that lives on without us; `name` is "" if it is not ours to end."""

    sock: socket.socket
    name: str
    claimed: bool = False


class Listeners:
    """Where listening sockets come from: inherited, or made and given to be kept.

    Without arguments they are made, and end with their server.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        inherited: Iterable[Inherited] = (),
        keeper: Keeper | None = None,
    ) -> None:
        """Own the `inherited` descriptors; `root` is the folder names begin below.

        Sockets are told apart by the path they are bound to. What is no listening
        unix socket with a path is closed with a warning.
        """
        self._root = root
        self._keeper = keeper
        self._kept: dict[Path, _Kept] = {}
        self._made: dict[Path, socket.socket] = {}
        for name, fd in inherited:
            found = _listening(fd)
            if found is None or found[1] in self._kept:
                logger.warning("descriptor %d (%s) is of no use to us", fd, name)
                if found is not None:
                    found[0].close()
                continue
            sock, path = found
            sock.setblocking(False)
            self._kept[path] = _Kept(sock, name if name.startswith(STORED) else "")

    def listen(self, path: Path, owner_uid: int | None = None) -> Listener:
        """Listen on `path`; raises as the function `listen`, which see."""
        kept = self._kept.get(path)
        if kept is not None and not path.is_socket():
            self.remove(path)  # somebody tidied up: nobody can reach it any more
            kept = None
        if kept is None:
            sock = listen(path, owner_uid)
            if self._keeper is None:
                return self._make(path, sock)
            kept = _Kept(sock, STORED + str(path.relative_to(self._root)))
            self._kept[path] = kept
            self._keeper.store(kept.name, sock.fileno())
        elif kept.name and owner_uid is not None:
            os.chown(path, owner_uid, -1)
        if kept.name and self._keeper is None:  # our own, from before an exec
            del self._kept[path]
            return self._make(path, kept.sock)
        kept.claimed = True
        return Listener(kept.sock.dup(), lambda: None)

    def _make(self, path: Path, sock: socket.socket) -> Listener:
        self._made[path] = sock
        return Listener(sock, unlinker(path))

    def all(self) -> list[Inherited]:
        """Give those that listen now, as the next process takes them; they stay ours.

        None of their files may be unlinked then, and `close` not be called.
        """
        made = [
            Inherited(STORED + str(path.relative_to(self._root)), sock.fileno())
            for path, sock in self._made.items()
            if sock.fileno() >= 0
        ]
        kept = [
            Inherited(one.name or UNNAMED, one.sock.fileno())
            for one in self._kept.values()
        ]
        return [*made, *kept]

    def remove(self, path: Path) -> None:
        """End the socket for good, where it is kept and not the manager's own."""
        kept = self._kept.get(path)
        if kept is None or not kept.name:
            return
        del self._kept[path]
        kept.sock.close()
        if path.is_socket():
            path.unlink()
        if self._keeper is not None:
            self._keeper.forget(kept.name)

    def remove_unclaimed(self) -> None:
        """End inherited sockets nobody asked for: of guests that are gone."""
        for path, kept in list(self._kept.items()):
            if not kept.claimed:
                logger.warning("%s: nobody here serves this socket", path)
                self.remove(path)

    def close(self) -> None:
        """Let go of all sockets; those that are kept live on."""
        for kept in self._kept.values():
            kept.sock.close()
        self._kept.clear()


def _listening(fd: int) -> tuple[socket.socket, Path] | None:
    """Take a unix stream socket that listens on a path; anything else is closed."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    if (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
        address = sock.getsockname()
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and address and isinstance(address, str):
            return sock, Path(address)
    sock.close()
    return None
