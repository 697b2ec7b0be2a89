"""The daemon as a process: its sockets, its signals, its refusals."""

import signal
import socket
import stat
from pathlib import Path

import pytest
import trio

from proxy.guest import attach
from tests.system.served import Served
from vbus.errors import NoDeviceError

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""


async def call(daemon: Served, data: bytes) -> bytes:
    async with attach(daemon.socket("g1")) as bridge:
        _, answer = await (await bridge.open("echo0")).call(0, data)
    return answer


def test_sigterm_closes_everything_and_exits_0(tmp_path: Path) -> None:
    """R60: a daemon that ends in order leaves no socket behind."""
    with Served(tmp_path, CONFIG) as daemon:
        assert stat.S_IMODE(daemon.socket("g1").stat().st_mode) == 0o600
        assert stat.S_IMODE((daemon.runtime / "control.sock").stat().st_mode) == 0o600
        assert daemon.stop() == 0
        assert [path.name for path in daemon.runtime.rglob("*.sock")] == []
        assert "Traceback" not in daemon.log.read_text()


async def test_sigterm_ends_attached_guests_with_a_clear_error(tmp_path: Path) -> None:
    with Served(tmp_path, CONFIG) as daemon:
        with pytest.RaisesGroup(
            NoDeviceError, flatten_subgroups=True, allow_unwrapped=True
        ):
            async with attach(daemon.socket("g1")) as bridge:
                await bridge.open("echo0")
                daemon.process.send_signal(signal.SIGTERM)
                await trio.sleep_forever()
        assert daemon.process.wait(10) == 0
        assert "Traceback" not in daemon.log.read_text()


def test_a_second_daemon_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with Served(tmp_path, CONFIG) as daemon:
        second = daemon.start()
        assert second.wait(20) == 1
        assert "another daemon runs in" in daemon.log.read_text()
        assert trio.run(call, daemon, b"still here") == b"still here"


def test_sockets_of_a_killed_daemon_are_taken_over(tmp_path: Path) -> None:
    with Served(tmp_path, CONFIG) as daemon:
        daemon.process.kill()
        daemon.process.wait()
        assert daemon.socket("g1").exists()
        daemon.log.unlink()
        daemon.process = daemon.start()
        daemon.wait_ready()
        assert trio.run(call, daemon, b"anew") == b"anew"


@pytest.mark.parametrize(
    ("config", "status", "message"),
    [
        ("[[bus]]\nname = 3\n", 78, "bus[0].name"),
        ("[[device]]\nname = 'd'\nclass = 'nonesuch'\n", 78, "no device class"),
        ("[[guest]]\nname = 'g'\nbus = 'nonesuch'\n", 78, "no bus 'nonesuch'"),
        ("[[device]]\nname = 'd'\nclass = 'venet'\nswitch = 'x'\n", 78, "device 'x'"),
    ],
)
def test_a_bad_configuration_ends_it_with_one_line(
    tmp_path: Path, config: str, status: int, message: str
) -> None:
    daemon = Served(tmp_path, config)
    assert daemon.process.wait(20) == status
    text = daemon.log.read_text()
    assert "vbus.toml: " in text
    assert message in text
    assert text.startswith("vbus: ")
    assert text.count("\n") == 1


def test_what_is_no_socket_is_never_removed(
    tmp_path: Path,
) -> None:
    """A file in the place of a socket is somebody else's."""
    (tmp_path / "run/guests").mkdir(parents=True)
    precious = tmp_path / "run/guests/g1.sock"
    precious.write_text("precious")
    daemon = Served(tmp_path, CONFIG)
    assert daemon.process.wait(20) == 1
    assert precious.read_text() == "precious"
    assert "is no socket" in daemon.log.read_text()


async def test_a_killed_guest_can_attach_again(tmp_path: Path) -> None:
    """R61: a connection that just ends frees the guest's place."""
    with Served(tmp_path, CONFIG) as daemon:
        first = socket.socket(socket.AF_UNIX)
        first.connect(str(daemon.socket("g1")))
        first.close()
        assert await call(daemon, b"again") == b"again"
