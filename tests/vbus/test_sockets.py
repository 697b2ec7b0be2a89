"""Listening sockets that outlive their daemon, with a real socket for each."""

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vbus.isolation.children import in_child
from vbus.errors import BusyError, ExistsError
from vbus.service.inherited import Inherited
from vbus.sockets import Listeners, listen


class Manager:
    """Keeps duplicates of what it is given, as the service manager does."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}

    def store(self, name: str, *fds: int) -> None:
        assert name not in self.kept
        [self.kept[name]] = [os.dup(fd) for fd in fds]

    def forget(self, name: str) -> None:
        os.close(self.kept.pop(name))

    def passed(self) -> list[Inherited]:
        return [Inherited(name, os.dup(fd)) for name, fd in self.kept.items()]


@pytest.fixture
def manager(no_fd_leak: None) -> Iterator[Manager]:
    made = Manager()
    yield made
    for name in list(made.kept):
        made.forget(name)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def waiting(sock: socket.socket) -> int:
    """How many clients were accepted that had connected."""
    found = 0
    while select.select([sock], [], [], 0)[0]:
        sock.accept()[0].close()
        found += 1
    return found


@pytest.mark.usefixtures("no_fd_leak")
def test_without_a_keeper_a_socket_ends_with_its_server(tmp_path: Path) -> None:
    listeners = Listeners()
    listener = listeners.listen(tmp_path / "a.sock")
    assert connects(tmp_path / "a.sock")
    listener.close()
    listeners.remove(tmp_path / "a.sock")
    listeners.close()
    assert not (tmp_path / "a.sock").exists()


def test_who_connects_between_two_daemons_is_served_by_the_second(
    tmp_path: Path, manager: Manager
) -> None:
    """R60, R61: no moment in which a guest is refused."""
    path = tmp_path / "guests" / "g1.sock"
    path.parent.mkdir()
    first = Listeners(tmp_path, (), manager)
    first.listen(path).close()
    first.close()
    assert list(manager.kept) == ["vbus/guests/g1.sock"]
    assert connects(path)
    second = Listeners(tmp_path, manager.passed(), manager)
    listener = second.listen(path)
    assert waiting(listener.sock) == 1
    assert connects(path)
    assert waiting(listener.sock) == 1
    listener.close()
    assert path.is_socket()
    second.close()


def test_what_is_removed_is_gone_for_good(tmp_path: Path, manager: Manager) -> None:
    path = tmp_path / "g1.sock"
    listeners = Listeners(tmp_path, (), manager)
    listeners.listen(path).close()
    listeners.remove(path)
    assert not path.exists()
    assert manager.kept == {}
    listeners.listen(path).close()  # and can come back
    assert connects(path)
    listeners.close()


def test_sockets_of_guests_that_are_gone_are_ended(
    tmp_path: Path, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    """The configuration changed between two daemons."""
    listeners = Listeners(tmp_path, (), manager)
    for name in ("g1.sock", "g2.sock"):
        listeners.listen(tmp_path / name).close()
    listeners.close()
    listeners = Listeners(tmp_path, manager.passed(), manager)
    listeners.listen(tmp_path / "g1.sock").close()
    listeners.remove_unclaimed()
    assert list(manager.kept) == ["vbus/g1.sock"]
    assert connects(tmp_path / "g1.sock")
    assert not (tmp_path / "g2.sock").exists()
    assert "g2.sock: nobody here serves this socket" in caplog.text
    listeners.close()


def test_the_managers_own_sockets_are_never_ended_by_us(
    tmp_path: Path, manager: Manager
) -> None:
    """Socket activation: its unit made the file, whatever name it gave."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        made.listen()
        fd = os.dup(made.fileno())
        listeners = Listeners(tmp_path, [Inherited("vbusd.socket", fd)], manager)
        assert connects(path)
        listener = listeners.listen(path)
        assert waiting(listener.sock) == 1
        listener.close()
        listeners.remove(path)
        again = listeners.listen(path)
        assert connects(path)
        assert waiting(again.sock) == 1
        again.close()
        listeners.remove_unclaimed()
        listeners.close()
        assert path.is_socket()
        assert manager.kept == {}


def test_a_socket_whose_file_is_gone_is_made_anew(
    tmp_path: Path, manager: Manager
) -> None:
    path = tmp_path / "g1.sock"
    listeners = Listeners(tmp_path, (), manager)
    listeners.listen(path).close()
    listeners.close()
    path.unlink()
    listeners = Listeners(tmp_path, manager.passed(), manager)
    listener = listeners.listen(path)
    assert connects(path)
    assert waiting(listener.sock) == 1
    assert list(manager.kept) == ["vbus/g1.sock"]
    listener.close()
    listeners.close()


def test_what_stands_in_its_place_is_not_removed(
    tmp_path: Path, manager: Manager
) -> None:
    path = tmp_path / "g1.sock"
    listeners = Listeners(tmp_path, (), manager)
    listeners.listen(path).close()
    path.unlink()
    path.write_text("somebody's file")
    with pytest.raises(ExistsError):
        listeners.listen(path)
    assert path.read_text() == "somebody's file"
    listeners.close()


def test_a_descriptor_twice_is_one_too_many(tmp_path: Path, manager: Manager) -> None:
    listeners = Listeners(tmp_path, (), manager)
    listeners.listen(tmp_path / "g1.sock").close()
    listeners.close()
    twice = Listeners(tmp_path, manager.passed() + manager.passed(), manager)
    twice.close()


def test_another_servers_socket_is_not_taken(tmp_path: Path, manager: Manager) -> None:
    path = tmp_path / "g1.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        listeners = Listeners(tmp_path, (), manager)
        with pytest.raises(BusyError):
            listeners.listen(path)
        listeners.close()
    assert manager.kept == {}


@pytest.mark.usefixtures("no_fd_leak")
def test_what_is_no_listening_unix_socket_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors of any kind may come: they harm nobody."""
    kinds = {
        "tcp": socket.socket(socket.AF_INET),
        "datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "silent": socket.socket(socket.AF_UNIX),
        "abstract": socket.socket(socket.AF_UNIX),
    }
    kinds["tcp"].bind(("127.0.0.1", 0))
    kinds["tcp"].listen()
    kinds["datagram"].bind(str(tmp_path / "d"))
    kinds["silent"].bind(str(tmp_path / "s"))
    kinds["abstract"].bind(f"\0vbus-test-{os.getpid()}")
    kinds["abstract"].listen()
    passed = [Inherited(name, sock.detach()) for name, sock in kinds.items()]
    passed.append(Inherited("memory", os.memfd_create("x")))
    Listeners(tmp_path, passed).close()
    assert caplog.text.count("is of no use to us") == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away")
def test_a_kept_socket_follows_its_guests_user(
    tmp_path: Path, manager: Manager
) -> None:
    path = tmp_path / "g1.sock"
    for uid in (65534, 1):
        listeners = Listeners(tmp_path, manager.passed(), manager)
        listeners.listen(path, uid).close()
        assert path.stat().st_uid == uid
        listeners.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away")
@pytest.mark.parametrize("alive", [False, True])
def test_a_socket_given_to_another_user_is_taken_over_once_it_is_dead(
    tmp_path: Path, alive: bool
) -> None:
    """A daemon without root may not even knock there."""

    def work() -> str:
        # By a relative name: the folders above are root's alone.
        os.chown(tmp_path, 65534, 65534)
        os.chdir(tmp_path)
        path = Path("g1.sock")
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            os.chown(path, 1, 1)
            path.chmod(0o600)
            if not alive:
                other.close()
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                listen(path).close()
            except BusyError:
                return "busy"
            return "taken"

    assert in_child(work) == ("busy" if alive else "taken")
