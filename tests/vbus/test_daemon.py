"""The daemon in this process: order, refusals, and whose failure ends what."""

import logging
import os
import resource
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.guest import attach
from vbus.bus import BusModel
from vbus.config import Config, GuestConfig, parse
from vbus.daemon import Daemon, Happening
from vbus.device import Connection, Device, attribute, call
from vbus.errors import (
    BusyError,
    ConfigError,
    ExistsError,
    NoDeviceError,
    NotFoundError,
    innermost,
)
from vbus.vfio_user.server import VfioUserServer

LOG: list[str] = []


class Plain(Device):
    """Answers; uses another device if told; notes its end."""

    type = "org.vbus.test.plain"
    max_connections = 8
    uses = attribute(str, default="")

    @call(0)
    def echo(self, connection: Connection, data: bytes) -> bytes:
        return data

    def setup(self) -> None:
        if self.uses:
            self.host.device(self.uses)

    def teardown(self) -> None:
        LOG.append(self.name)


class Working(Plain):
    """Has a task; `fail` ends it with an error."""

    def setup(self) -> None:
        self.started, self.cancelled = trio.Event(), trio.Event()
        self.fail = trio.Event()

    async def serve(self) -> None:
        self.started.set()
        try:
            await self.fail.wait()
        except trio.Cancelled:
            self.cancelled.set()
            raise
        raise ZeroDivisionError("a bug of the device")


ONE_BUS = """
[[bus]]
name = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
"""


def device(name: str, kind: str = "plain", **attributes: str) -> str:
    more = "".join(f'{key} = "{value}"\n' for key, value in attributes.items())
    return f'[[device]]\nname = "{name}"\nclass = "{kind}"\nbus = "bus0"\n{more}'


def made(folder: Path, text: str) -> Daemon:
    model = BusModel({"plain": Plain, "working": Working})
    return Daemon(parse(text), folder / "run", model)


@asynccontextmanager
async def running(folder: Path, text: str = ONE_BUS) -> AsyncIterator[Daemon]:
    """A daemon that has started; it must stop by itself when told."""
    daemon = made(folder, text)
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.run)
        try:
            yield daemon
        finally:
            daemon.stop()


def socket_of(daemon: Daemon, guest: str = "g1") -> Path:
    return daemon.runtime_dir / "guests" / f"{guest}.sock"


def sockets_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


async def echoed(daemon: Daemon, name: str, guest: str = "g1") -> bool:
    async with attach(socket_of(daemon, guest), memory_mib=4) as bridge:
        with trio.fail_after(5):
            _, answer = await (await bridge.open(name)).call(0, b"ping")
    return answer == b"ping"


async def refused_start(folder: Path, text: str) -> BaseException:
    with trio.fail_after(5):
        try:
            await made(folder, text).run()
        except (Exception, BaseExceptionGroup) as error:
            return innermost(error)
    raise AssertionError("it started")


# Starting and stopping


@pytest.mark.usefixtures("no_fd_leak")
async def test_everything_is_there_once_started_and_gone_once_stopped(
    tmp_path: Path,
) -> None:
    """R60, R61: sockets, devices and descriptors live as long as the daemon."""
    async with running(tmp_path, ONE_BUS + device("d0")) as daemon:
        assert daemon.control_path.is_socket()
        assert socket_of(daemon).is_socket()
        assert await echoed(daemon, "d0")
    assert not sockets_in(tmp_path)
    assert daemon.model.devices == {}
    assert daemon.guests == {}


async def test_a_second_daemon_is_refused_until_the_first_has_ended(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as daemon:
        error = await refused_start(tmp_path, "")
        assert isinstance(error, BusyError)
        assert str(daemon.runtime_dir) in str(error)
        assert daemon.control_path.is_socket()
    async with running(tmp_path):
        pass


async def test_directories_are_closed_to_others(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        for path in (daemon.runtime_dir, daemon.runtime_dir / "guests"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o027 == 0
        assert stat.S_IMODE(socket_of(daemon).stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away")
async def test_a_guest_of_another_user_can_reach_its_socket(tmp_path: Path) -> None:
    """R51: it is that user's, and what lies beside it cannot be listed."""
    async with running(tmp_path) as daemon:
        guest = await daemon.add_guest(GuestConfig("g2", "bus0", uid=65534))
        assert guest.path.stat().st_uid == 65534
        assert stat.S_IMODE(guest.path.stat().st_mode) == 0o600
        for path in (daemon.runtime_dir, guest.path.parent):
            assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0o001


async def test_it_takes_all_descriptors_it_may_have(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, hard)
    )
    try:
        async with running(tmp_path):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE_BUS + device("d0", "nonesuch"), "device d0: no device class 'nonesuch'"),
        (ONE_BUS + device("d0", colour="red"), "device d0: .*no attribute 'colour'"),
        (ONE_BUS + device("d0", uses="d1"), "device d0: no device 'd1'"),
        ("[[guest]]\nname='g'\nbus='b'\n", "guest g: no bus 'b'"),
        ("[[guest]]\nname='../g'\nbus='b'\n", r"guest \.\./g: bad name"),
        ("[[bus]]\nname='B'\n", "bus B: bad name 'B'"),
    ],
)
@pytest.mark.usefixtures("no_fd_leak")
async def test_what_cannot_be_made_as_configured_is_a_config_error(
    tmp_path: Path, text: str, message: str
) -> None:
    """The message names the source, the table and what is wrong in it."""
    error = await refused_start(tmp_path, text)
    assert isinstance(error, ConfigError)
    with pytest.raises(ConfigError, match=f"^configuration: {message}"):
        raise error
    assert not sockets_in(tmp_path)


async def test_a_failed_start_removes_the_devices_it_made(tmp_path: Path) -> None:
    LOG.clear()
    text = ONE_BUS + device("d0") + device("d1", uses="d0") + device("d2", "nonesuch")
    await refused_start(tmp_path, text)
    assert LOG == ["d1", "d0"]


async def test_devices_end_before_those_they_use(tmp_path: Path) -> None:
    LOG.clear()
    text = device("a") + device("b", uses="a") + device("c", uses="b")
    async with running(tmp_path, ONE_BUS + text):
        pass
    assert LOG == ["c", "b", "a"]


async def test_devices_that_use_each_other_do_not_keep_it_from_stopping(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LOG.clear()
    with trio.fail_after(5):
        async with running(tmp_path, ONE_BUS + device("free")) as daemon:
            one = await daemon.add_device("one", "plain", {})
            await daemon.add_device("two", "plain", {"uses": "one"})
            one.host.device("two")
    assert LOG == ["free"]
    assert "they use each other: one, two" in caplog.text


# Changes while it runs


async def test_a_guest_added_live_can_attach_and_is_gone_once_removed(
    tmp_path: Path,
) -> None:
    """R61: the socket is there on return and gone on return."""
    async with running(tmp_path, ONE_BUS + device("d0")) as daemon:
        guest = await daemon.add_guest(GuestConfig("g2", "bus0"))
        assert daemon.guests["g2"] is guest
        assert await echoed(daemon, "d0", "g2")
        await daemon.remove_guest("g2")
        assert not guest.path.exists()
        assert "g2" not in daemon.guests
        with pytest.raises(NotFoundError):
            await daemon.remove_guest("g2")
        assert await echoed(daemon, "d0")


async def test_a_removed_guest_holds_its_bus_no_longer(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        with pytest.raises(BusyError):
            daemon.model.remove_bus("bus0")
        await daemon.remove_guest("g1")
        daemon.model.remove_bus("bus0")


async def test_removing_an_attached_guest_ends_its_connections(tmp_path: Path) -> None:
    async with running(tmp_path, ONE_BUS + device("d0")) as daemon:
        with pytest.RaisesGroup(
            NoDeviceError, allow_unwrapped=True, flatten_subgroups=True
        ):
            async with attach(socket_of(daemon), memory_mib=4) as bridge:
                await bridge.open("d0")
                assert len(daemon.model.device("d0").connections) == 1
                await daemon.remove_guest("g1")
                await trio.sleep_forever()
        assert daemon.model.device("d0").connections == set()


@pytest.mark.usefixtures("no_fd_leak")
async def test_a_refused_guest_leaves_nothing(tmp_path: Path) -> None:
    """The refusal comes as itself, and the name stays free."""
    async with running(tmp_path) as daemon:
        with pytest.raises(ExistsError, match="guest g1 exists"):
            await daemon.add_guest(GuestConfig("g1", "bus0"))
        with pytest.raises(NotFoundError, match="no bus"):
            await daemon.add_guest(GuestConfig("g2", "nonesuch"))
        socket_of(daemon, "g2").write_text("precious")
        with pytest.raises(ExistsError, match="is no socket"):
            await daemon.add_guest(GuestConfig("g2", "bus0"))
        assert set(daemon.guests) == {"g1"}
        socket_of(daemon, "g2").unlink()
        await daemon.add_guest(GuestConfig("g2", "bus0"))


async def test_two_who_add_the_same_guest_at_once_get_one(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        outcomes = []

        async def add() -> None:
            try:
                await daemon.add_guest(GuestConfig("g2", "bus0"))
                outcomes.append("added")
            except ExistsError:
                outcomes.append("refused")
            # Whoever lists guests now finds none that is half there.
            assert all(guest.bridge for guest in daemon.guests.values())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(add)
            nursery.start_soon(add)
        assert sorted(outcomes) == ["added", "refused"]


async def test_a_device_that_cannot_be_linked_is_not_left_behind(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as daemon:
        with pytest.raises(NotFoundError, match="no bus"):
            await daemon.add_device("d0", "plain", {}, ["bus0", "nonesuch"])
        assert daemon.model.devices == {}
        with pytest.raises(ExistsError, match="already"):
            await daemon.add_device("d0", "plain", {}, ["bus0", "bus0"])
        assert daemon.model.devices == {}
        assert not daemon.model.bus("bus0").interfaces


async def test_watchers_are_told_every_change(tmp_path: Path) -> None:
    """R11: in the order of what happened; not after they left."""
    async with running(tmp_path) as daemon:
        told: list[Happening] = []
        unwatch = daemon.watch(told.append)
        await daemon.add_device("d0", "plain", {}, ["bus0"])
        await daemon.add_guest(GuestConfig("g2", "bus0"))
        assert await echoed(daemon, "d0", "g2")
        await daemon.remove_guest("g2")
        await daemon.remove_device("d0")
        unwatch()
        daemon.model.add_bus("bus1")
        assert told == [
            {"event": "device-added", "device": "d0"},
            {"event": "linked", "bus": "bus0", "device": "d0", "id": 0},
            {"event": "guest-added", "guest": "g2", "bus": "bus0"},
            {"event": "guest-attached", "guest": "g2"},
            {"event": "guest-left", "guest": "g2"},
            {"event": "guest-removed", "guest": "g2"},
            {"event": "unlinked", "bus": "bus0", "device": "d0", "id": 0},
            {"event": "device-removed", "device": "d0"},
        ]


# Whose failure ends what


async def test_the_task_of_a_device_lives_as_long_as_the_device(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as daemon:
        working = await daemon.add_device("w0", "working", {}, ["bus0"])
        assert isinstance(working, Working)
        with trio.fail_after(5):
            await working.started.wait()
            await daemon.remove_device("w0")
            await working.cancelled.wait()


async def test_a_device_removed_before_its_task_ran_gets_none(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        first = await daemon.add_device("w0", "working", {})
        await daemon.remove_device("w0")
        second = await daemon.add_device("w0", "working", {})
        assert isinstance(first, Working)
        assert isinstance(second, Working)
        with trio.fail_after(5):
            await second.started.wait()
        assert not first.started.is_set()


async def test_a_device_whose_task_fails_leaves_its_bus_and_nothing_else_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """R60: the log has the traceback, the guests' other devices go on."""
    async with running(tmp_path, ONE_BUS + device("d0")) as daemon:
        failed = trio.Event()
        unwatch = daemon.watch(
            lambda about: failed.set() if about["event"] == "device-failed" else None
        )
        working = await daemon.add_device("w0", "working", {}, ["bus0"])
        assert isinstance(working, Working)
        async with attach(socket_of(daemon), memory_mib=4) as bridge:
            proxy = await bridge.device("w0")
            working.fail.set()
            with trio.fail_after(5):
                await failed.wait()
                await proxy.gone.wait()
                _, answer = await (await bridge.open("d0")).call(0, b"still here")
            assert answer == b"still here"
        unwatch()
        assert [interface.name for interface in _interfaces(daemon)] == ["d0"]
        assert "ZeroDivisionError: a bug of the device" in caplog.text
        await daemon.remove_device("w0")


def _interfaces(daemon: Daemon) -> list[Any]:
    return list(daemon.model.bus("bus0").interfaces.values())


async def test_a_guest_whose_serving_fails_ends_alone(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bug in serving one guest is that guest's end, and it can be added again."""
    async with running(tmp_path, ONE_BUS + device("d0")) as daemon:
        with monkeypatch.context() as patched:
            patched.setattr(VfioUserServer, "_accept", _fail)
            told: list[Happening] = []
            unwatch = daemon.watch(told.append)
            await daemon.add_guest(GuestConfig("g2", "bus0"))
            with trio.fail_after(5):
                while "g2" in daemon.guests:
                    await trio.lowlevel.checkpoint()
            unwatch()
        assert {"event": "guest-failed", "guest": "g2", "message": "a bug"} in told
        assert "RuntimeError: a bug" in caplog.text
        assert not socket_of(daemon, "g2").exists()
        assert await echoed(daemon, "d0")
        await daemon.add_guest(GuestConfig("g2", "bus0"))
        assert await echoed(daemon, "d0", "g2")


async def _fail(*_: object) -> None:
    await trio.lowlevel.checkpoint()
    raise RuntimeError("a bug")


async def test_a_device_that_fails_to_tear_down_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    LOG.clear()

    def teardown(device: Plain, plain: Callable[[Plain], None]) -> None:
        if device.name == "bad":
            raise ZeroDivisionError
        plain(device)

    monkeypatch.setattr(
        Plain, "teardown", lambda self, plain=Plain.teardown: teardown(self, plain)
    )
    text = ONE_BUS + device("a") + device("bad") + device("c")
    async with running(tmp_path, text):
        pass
    assert LOG == ["c", "a"]
    assert "bad: removing it failed" in caplog.text


async def test_stopping_with_a_guest_inside_a_slow_call_does_not_wait_for_it(
    tmp_path: Path,
) -> None:
    """A device that hangs delays nobody's end."""
    inside = trio.Event()

    class Slow(Plain):
        @call(1)
        async def hang(self, connection: Connection, data: bytes) -> None:
            inside.set()
            await trio.sleep_forever()

    daemon = Daemon(
        parse(ONE_BUS + device("s0", "slow")),
        tmp_path / "run",
        BusModel({"slow": Slow}),
    )

    async def caller() -> None:
        with pytest.RaisesGroup(
            NoDeviceError, allow_unwrapped=True, flatten_subgroups=True
        ):
            async with attach(socket_of(daemon), memory_mib=4) as bridge:
                await (await bridge.open("s0")).call(1)

    with trio.fail_after(4):
        async with trio.open_nursery() as nursery:
            await nursery.start(daemon.run)
            nursery.start_soon(caller)
            await inside.wait()
            daemon.stop()


def test_a_daemon_without_a_configuration_is_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        daemon = Daemon(Config(), tmp_path / "run")
        async with trio.open_nursery() as nursery:
            await nursery.start(daemon.run)
            assert not daemon.model.buses
            assert "echo" in daemon.model.classes
            daemon.stop()

    with caplog.at_level(logging.INFO):
        trio.run(main)
    assert [record.getMessage() for record in caplog.records] == [
        f"ready in {tmp_path / 'run'}",
        "stopping",
    ]
