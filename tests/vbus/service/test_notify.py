"""sd_notify: what a manager's own socket receives, and what when there is none."""

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.vbus.isolation.children import in_child
from vbus.errors import ConfigError
from vbus.isolation import isolate
from vbus.service.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The manager's end: a real datagram socket at tmp_path/notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.setblocking(False)
        yield end


@pytest.fixture
def notifier(manager: socket.socket) -> Iterator[Notifier]:
    made = Notifier(manager.getsockname())
    yield made
    made.close()


def received(manager: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


def test_messages_are_those_of_sd_notify(
    manager: socket.socket, notifier: Notifier
) -> None:
    """Golden: sd_notify(3)."""
    notifier.ready()
    notifier.status("3 of 4 guests attached,\n all is well")
    notifier.alive()
    notifier.stopping()
    assert received(manager) == [
        "READY=1",
        "STATUS=3 of 4 guests attached, all is well",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=Stopping.",
    ]
    assert (notifier.statistics().sent, notifier.statistics().lost) == (4, 0)


def test_stored_descriptors_travel_with_their_name(
    manager: socket.socket, notifier: Notifier
) -> None:
    reader, writer = os.pipe()
    try:
        notifier.store("vbus/guests/g1.sock", reader, writer)
        text, ancillary, _, _ = manager.recvmsg(4096, 1024)
        notifier.forget("vbus/guests/g1.sock")
        assert received(manager) == ["FDSTOREREMOVE=1\nFDNAME=vbus/guests/g1.sock"]
        assert text == b"FDSTORE=1\nFDNAME=vbus/guests/g1.sock"
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        try:
            assert os.path.sameopenfile(fds[0], reader)
            os.write(fds[1], b"x")
            assert os.read(reader, 1) == b"x"
        finally:
            for fd in fds:
                os.close(fd)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("name", ["a:b", "a\nb", "ä", "x" * 256])
def test_a_name_systemd_would_refuse_is_a_mistake(
    notifier: Notifier, name: str
) -> None:
    with pytest.raises(ValueError, match="no name for a descriptor"):
        notifier.store(name, 0)


def test_an_abstract_address_is_reached() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0vbus-notify-{os.getpid()}")
        notifier = Notifier(f"@vbus-notify-{os.getpid()}")
        notifier.ready()
        notifier.close()
        assert end.recv(100) == b"READY=1"


@pytest.mark.usefixtures("no_fd_leak")
def test_without_a_manager_nothing_happens() -> None:
    environment = {"HOME": "/"}
    notifier = Notifier.from_environment(environment)
    assert not notifier.connected
    notifier.ready()
    notifier.store("vbus/x", 0)
    assert notifier.statistics().sent == 0
    notifier.close()


def test_a_manager_that_does_not_read_costs_messages_not_time(
    notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10_000):
        notifier.alive()
        if notifier.statistics().lost:
            break
    assert notifier.statistics().lost == 1
    assert "the service manager was not told 'WATCHDOG=1'" in caplog.text


def test_the_variables_are_taken_and_not_inherited(manager: socket.socket) -> None:
    environment = {
        "NOTIFY_SOCKET": manager.getsockname(),
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    notifier = Notifier.from_environment(environment)
    assert (notifier.connected, notifier.watchdog_s) == (True, 3.0)
    assert environment == {"HOME": "/"}
    notifier.close()


def test_somebody_elses_watchdog_is_not_ours() -> None:
    environment = {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(environment).watchdog_s is None


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "tcp://manager"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "me"},
    ],
)
def test_variables_that_mean_nothing_are_refused(environment: dict[str, str]) -> None:
    [name, *_] = environment
    with pytest.raises(ConfigError, match=name):
        Notifier.from_environment(environment)


async def test_the_watchdog_is_fed_at_half_its_time(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    """R60: by a task of the loop, so a loop that is stuck is silent."""
    notifier = Notifier(manager.getsockname(), watchdog_s=20)
    with trio.move_on_after(45):
        await notifier.keep_alive()
    notifier.close()
    assert received(manager) == ["WATCHDOG=1"] * 5  # at 0, 10, 20, 30, 40


def test_it_goes_on_in_an_isolated_process(
    manager: socket.socket, notifier: Notifier
) -> None:
    """The socket was connected before sockets were given up."""

    def work() -> None:
        isolate()
        notifier.ready()
        assert notifier.statistics().sent == 1

    in_child(work)
    assert received(manager) == ["READY=1"]
