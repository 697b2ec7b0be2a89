"""`vbus trace`, the log's fields, the group that may manage: at a real daemon."""

import grp
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.guest import attach
from tests.system.served import WITHIN_S, Served
from vbus.control.client import ControlClient
from vbus.errors import PermissionDeniedError, VbusError

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[device]]
name = "echo1"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, CONFIG) as served:
        yield served


def calls(daemon: Served) -> None:
    async def ask() -> None:
        async with attach(daemon.socket("g1")) as bridge:
            one, two = await bridge.open("echo0"), await bridge.open("echo1")
            await one.call(0, b"hello")
            await two.call(0, b"hi")
            with pytest.raises(VbusError):
                await two.call(99, b"")

    trio.run(ask)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_dump_shows_what_happened_lately(daemon: Served) -> None:
    calls(daemon)
    dumped = lines(daemon.vbus("trace", "--json").stdout)
    seen = [(one["kind"], one["device"], one["result"]) for one in dumped]
    assert seen[:5] == [
        ("open", "echo0", 0),
        ("open", "echo1", 0),
        ("call", "echo0", 0),
        ("call", "echo1", 0),
        ("call", "echo1", -22),
    ]
    assert set(seen[5:]) == {("close", "echo0", None), ("close", "echo1", None)}
    assert {one["guest"] for one in dumped} == {"g1"}
    only = lines(daemon.vbus("trace", "--dump", "--device", "echo0", "--json").stdout)
    assert {one["device"] for one in only} == {"echo0"}
    assert daemon.vbus("trace", "--guest", "other").stdout == ""
    assert "-EINVAL" in daemon.vbus("trace").stdout


def test_following_shows_what_happens_from_now_on(daemon: Served) -> None:
    calls(daemon)
    with subprocess.Popen(
        [sys.executable, "-m", "vbus", "trace", "--follow", "--json"],
        env=daemon.environment,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        said = b""
        while not said:  # not known when it follows
            calls(daemon)
            said = process.stdout.read() or b""
        process.send_signal(signal.SIGINT)
        assert process.wait(WITHIN_S) == 130
    [first, *_] = lines(said.decode())
    assert first["guest"] == "g1"


def test_a_daemon_that_does_not_trace_says_so(tmp_path: Path) -> None:
    with Served(tmp_path, "[daemon]\ntrace = 0\n" + CONFIG) as daemon:
        calls(daemon)
        done = daemon.vbus("trace")
        assert daemon.ask("stats", "daemon/traced") == 0
    assert done.returncode == 1
    assert "does not trace" in done.stderr


# The log


def test_lines_of_the_log_say_which_guest_bus_and_device(tmp_path: Path) -> None:
    """R60: programs find them as fields; a client that leaves is told too."""
    daemon = Served(tmp_path, CONFIG, words=("--log-format", "json"))
    with daemon:
        calls(daemon)
        while "client left" not in daemon.log.read_text():
            assert daemon.process.poll() is None
    logged = lines(daemon.log.read_text())
    [left] = [one for one in logged if "client left" in one["event"]]
    assert (left["guest"], left["bus"], left["level"]) == ("g1", "bus0", "info")
    assert {"timestamp", "logger"} <= left.keys()


def test_text_lines_carry_the_same_names(daemon: Served) -> None:
    calls(daemon)
    while "client left" not in daemon.log.read_text():
        assert daemon.process.poll() is None
    [line] = [one for one in daemon.log.read_text().splitlines() if "left" in one]
    assert "guest=g1" in line
    assert "bus=bus0" in line


# The group


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_user(uid: int, groups: list[int], work: Callable[[], object]) -> int:
    """Run `work` as another user, in a child; its status."""
    child = os.fork()
    if not child:
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            work()
        except PermissionDeniedError:
            os._exit(13)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_members_of_the_group_may_manage_and_nobody_else(open_folder: Path) -> None:
    nobody, members = 65534, grp.getgrgid(1)
    config = f"[daemon]\ngroup = '{members.gr_name}'\n" + CONFIG
    with Served(open_folder, config) as daemon:
        path = daemon.runtime / "control.sock"
        for socket in (path, daemon.runtime / "metrics.sock"):
            assert stat.S_IMODE(socket.stat().st_mode) == 0o660
            assert socket.stat().st_gid == members.gr_gid
        assert stat.S_IMODE(daemon.socket("g1").stat().st_mode) == 0o600

        async def show() -> None:
            async with ControlClient(path) as control:
                await control.request("tree")

        def ask() -> None:
            trio.run(show)

        assert as_user(nobody, [members.gr_gid], ask) == 0
        assert as_user(nobody, [], ask) == 1  # the kernel keeps it out
        daemon.runtime.chmod(0o755)
        path.chmod(0o666)
        assert as_user(nobody, [members.gr_gid], ask) == 0
        assert as_user(nobody, [], ask) == 13  # and the daemon, if the file does not


def test_a_group_that_is_not_there_is_a_wrong_configuration(tmp_path: Path) -> None:
    daemon = Served(tmp_path, "[daemon]\ngroup = 'no such group'\n")
    assert daemon.process.wait(WITHIN_S) == 78
    assert "no group 'no such group'" in daemon.log.read_text()


# Smaller ones


def test_a_guest_is_added_with_all_its_options(daemon: Served) -> None:
    options = ("--spin-us", "0", "--call-timeout-s", "1.5", "--allow-truncatable")
    assert daemon.vbus("guest", "add", "g2", "--bus", "bus0", *options).returncode == 0
    added = daemon.ask("save")["guest"][1]
    assert added == {
        "name": "g2",
        "bus": "bus0",
        "spin_us": 0,
        "call_timeout_s": 1.5,
        "allow_truncatable": True,
    }
