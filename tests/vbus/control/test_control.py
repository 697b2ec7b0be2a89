"""The control socket of a daemon: what can be asked, by whom, and what harms nobody."""

import os
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from vbus.bus import BusModel
from vbus.config import Config
from vbus.control import server as server_module
from vbus.control import wire
from vbus.control.client import ControlClient
from vbus.control.operations import OPERATIONS
from vbus.daemon import Daemon
from vbus.device import Device, attribute
from vbus.errors import (
    BusyError,
    ExistsError,
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    UnreachableError,
    VbusError,
)


class Lamp(Device):
    """A lamp."""

    type = "org.example.lamp"
    level = attribute(int, default=1, writable=True, doc="how bright")
    room = attribute(str, default="hall")


class Broken(Device):
    """A device with a bug."""

    def statistics(self) -> object:
        raise ZeroDivisionError("a bug")

    def attribute_changed(self, name: str) -> None:
        raise ZeroDivisionError("another bug")

    level = attribute(int, default=1, writable=True)


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Daemon]:
    model = BusModel({"lamp": Lamp, "broken": Broken})
    daemon = Daemon(Config(), folder / "run", model)
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.run)
        yield daemon
        daemon.stop()


@asynccontextmanager
async def control(daemon: Daemon) -> AsyncIterator[ControlClient]:
    async with ControlClient(daemon.control_path) as client:
        with trio.fail_after(10):
            yield client


async def raw(daemon: Daemon) -> trio.SocketStream:
    return await trio.open_unix_socket(daemon.control_path)


async def answers(stream: trio.SocketStream) -> list[wire.Answer]:
    """All that is said until the daemon hangs up."""
    frames, got = wire.Frames(), []
    with trio.fail_after(10):
        try:
            async for data in stream:
                got += map(wire.to_answer, frames.feed(data))
        except trio.BrokenResourceError:
            pass  # it closed with our bytes unread
    return got


async def test_a_device_is_added_shown_set_and_removed(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        await client.request("bus.add", name="bus0")
        about = {"class_name": "lamp", "attributes": {"level": "0x10"}}
        shown = await client.request("device.add", name="l", buses=["bus0"], **about)
        assert shown == {
            "name": "l",
            "class": "lamp",
            "type": "org.example.lamp",
            "links": [{"bus": "bus0", "id": 0}],
            "attributes": {"level": 16, "room": "hall"},
            "connections": [],
            "expose": "bridge",
        }
        assert await client.request("device.show") == [shown]
        await client.request("device.set", name="l", attributes={"level": 5})
        [shown] = await client.request("device.show", name="l")
        assert shown["attributes"]["level"] == 5
        assert await client.request("device.remove", name="l") == {"name": "l"}
        assert await client.request("device.show") == []


async def test_links_buses_and_guests_are_shown(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        for name in ("b0", "b1"):
            await client.request("bus.add", name=name)
        await client.request("device.add", name="l", class_name="lamp", buses=["b0"])
        link = {"bus": "b1", "device": "l"}
        assert await client.request("device.link", **link) == {**link, "id": 0}
        guest = await client.request("guest.add", guest={"name": "g", "bus": "b1"})
        assert stat.S_ISSOCK(os.stat(guest["socket"]).st_mode)
        assert guest["attached"] is False
        tree = await client.request("tree")
        assert [one["guests"] for one in tree["buses"]] == [[], ["g"]]
        assert [one["bus"] for one in tree["devices"][0]["links"]] == ["b0", "b1"]
        await client.request("device.unlink", **link)
        await client.request("guest.remove", name="g")
        assert list((daemon.runtime_dir / "guests").iterdir()) == []
        assert await client.request("guest.show") == []
        assert await client.request("bus.remove", name="b1") == {"name": "b1"}


@pytest.mark.parametrize(
    ("op", "args", "error"),
    [
        ("nonesuch", {}, NotFoundError),
        ("device.show", {"name": "nonesuch"}, NotFoundError),
        ("device.add", {"name": "l", "class_name": "nonesuch"}, NotFoundError),
        ("device.add", {"name": "UPPER", "class_name": "lamp"}, InvalidError),
        ("device.add", {"name": "../x", "class_name": "lamp"}, InvalidError),
        (
            "device.add",
            {"name": "l", "class_name": "lamp", "buses": ["b0", "nonesuch"]},
            NotFoundError,
        ),
        (
            "device.set",
            {"name": "old", "attributes": {"room": "x"}},
            PermissionDeniedError,
        ),
        ("device.set", {"name": "old", "attributes": {"level": "x"}}, InvalidError),
        ("device.remove", {"name": "nonesuch"}, NotFoundError),
        ("bus.add", {"name": "b0"}, ExistsError),
        ("bus.remove", {"name": "b0"}, BusyError),
        ("guest.add", {"guest": {"name": "g", "bus": "nonesuch"}}, NotFoundError),
        ("guest.add", {"guest": {"name": "../g", "bus": "b0"}}, InvalidError),
        ("guest.add", {"guest": {"name": "g", "bus": "b0", "uid": "x"}}, InvalidError),
        ("guest.remove", {"name": "nonesuch"}, NotFoundError),
        ("stats", {"path": "devices/nonesuch"}, NotFoundError),
        ("stats", {"path": "daemon/tasks/x"}, NotFoundError),
    ],
)
async def test_a_refusal_changes_nothing_and_keeps_the_connection(
    tmp_path: Path, op: str, args: dict[str, Any], error: type[VbusError]
) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        await client.request("bus.add", name="b0")
        await client.request("device.add", name="old", class_name="lamp", buses=["b0"])
        before = await client.request("tree")
        with pytest.raises(error):
            await client.request(op, **args)
        assert await client.request("tree") == before


@pytest.mark.parametrize("op", sorted(OPERATIONS))
async def test_every_op_refuses_arguments_it_does_not_know(
    tmp_path: Path, op: str
) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        with pytest.raises(InvalidError, match=op):
            await client.request(op, surprise=1)
        with pytest.raises(InvalidError, match=op):
            await client.request(op, name=[], path=[], guest=[], bus=[])


async def test_a_bug_of_a_device_is_an_error_and_not_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        await client.request("device.add", name="bad", class_name="broken")
        await client.request("device.add", name="good", class_name="lamp")
        with pytest.raises(VbusError, match="another bug"):
            await client.request("device.set", name="bad", attributes={"level": 2})
        counters = await client.request("stats", path="device")
        assert "a bug" in counters["bad"]["error"]
        assert counters["good"].keys() == {"bus"}
    assert "ZeroDivisionError" in caplog.text


async def test_an_attribute_too_wide_for_msgpack_is_shown_as_text(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        await client.request("device.add", name="l", class_name="lamp")
        wide = str(1 << 70)
        await client.request("device.set", name="l", attributes={"level": wide})
        [shown] = await client.request("device.show", name="l")
        assert shown["attributes"]["level"] == wide


async def test_an_answer_over_the_limit_of_a_frame_arrives(tmp_path: Path) -> None:
    """R11: thousands of devices can be shown."""
    async with running(tmp_path) as daemon, control(daemon) as client:
        for nth in range(30):
            await daemon.add_device(
                f"l{nth}", "lamp", {"room": "x" * (wire.FRAME_LIMIT // 10)}
            )
        shown = await client.request("device.show")
        assert [one["name"] for one in shown] == [f"l{nth}" for nth in range(30)]
        assert (await client.request("stats", path="daemon"))["tasks"] > 0


async def watched(daemon: Daemon, watchers: int) -> None:
    """Wait until that many clients have their stream of events."""
    with trio.fail_after(10):
        while len(daemon._watchers) != watchers:
            await trio.lowlevel.checkpoint()


async def test_two_watchers_see_the_same_changes(tmp_path: Path) -> None:
    seen: list[list[object]] = [[], []]

    async def watch(watcher: ControlClient, into: list[object]) -> None:
        async for event in watcher.events():
            into.append(event["event"])
            if event["event"] == "device-removed":
                return

    async with (
        running(tmp_path) as daemon,
        control(daemon) as first,
        control(daemon) as second,
        control(daemon) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(watch, first, seen[0])
        nursery.start_soon(watch, second, seen[1])
        await watched(daemon, 2)
        await client.request("bus.add", name="b0")
        await client.request("device.add", name="l", class_name="lamp", buses=["b0"])
        await client.request("device.remove", name="l")
    assert seen[0] == seen[1]
    assert seen[0] == [
        "start",
        "bus-added",
        "device-added",
        "linked",
        "unlinked",
        "device-removed",
    ]


async def test_what_there_is_and_every_change_since_leave_no_gap(
    tmp_path: Path,
) -> None:
    """R11: a mirror of the tree that follows the events is never wrong."""
    async with running(tmp_path) as daemon, control(daemon) as watcher:
        stop = trio.Event()

        async def change() -> None:
            for nth in range(10_000):
                daemon.model.add_bus(f"b{nth}")
                await trio.lowlevel.checkpoint()
                if stop.is_set():
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            while len(daemon.model.buses) < 5:
                await trio.lowlevel.checkpoint()
            events = watcher.events(tree=True)
            first = await anext(events)
            known = [bus["name"] for bus in first["buses"]]  # type: ignore[attr-defined]
            assert first["event"] == "tree"
            assert len(known) >= 5
            while len(known) < 500:
                known.append((await anext(events))["bus"])
            stop.set()
        assert known == [f"b{nth}" for nth in range(500)]


async def test_a_watcher_that_never_reads_harms_nobody_and_is_told_its_losses(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        await client.request("device.add", name="l", class_name="lamp")
        async with await raw(daemon) as lazy:
            await lazy.send_all(wire.encode(wire.Request(1, 1, "events")))
            await watched(daemon, 1)
            changes = 20_000
            for nth in range(changes):
                daemon.model.set_attribute("l", "level", nth)
                if nth % 100 == 0:
                    await client.request("stats", path="daemon")
            frames, told, lost = wire.Frames(), 0, 0
            with trio.fail_after(10):
                while told + lost < changes:
                    for body in frames.feed(await lazy.receive_some()):
                        event = wire.to_answer(body).event or {}
                        told += event.get("event") == "device-changed"
                        count = event.get("count", 0)
                        assert isinstance(count, int)
                        lost += count
        assert lost > 0
        assert told + lost == changes


async def test_a_watcher_that_leaves_is_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as daemon:
        async with await raw(daemon) as stream:
            await stream.send_all(wire.encode(wire.Request(1, 1, "events")))
            await watched(daemon, 1)
        await watched(daemon, 0)
        daemon.model.add_bus("b0")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x03\x00\x00\x00\xc1\xc1\xc1",
        wire.encode(wire.Request(2, 1, "tree")),
    ],
)
async def test_garbage_is_answered_and_ends_only_its_connection(
    tmp_path: Path, garbage: bytes
) -> None:
    async with running(tmp_path) as daemon, control(daemon) as client:
        async with await raw(daemon) as stream:
            await stream.send_all(garbage)
            [answer] = await answers(stream)
        assert answer.error is not None
        assert answer.error.errno == "EPROTO"
        assert await client.request("device.show") == []


async def test_a_client_that_floods_and_never_reads_loses_only_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "SEND_TIMEOUT_S", 0.2)
    async with running(tmp_path) as daemon, control(daemon) as client:
        flood = wire.encode(wire.Request(1, 1, "class.show")) * 100_000
        async with await raw(daemon) as stream, trio.open_nursery() as nursery:

            async def flood_until_cut_off() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.send_all(flood)
                nursery.cancel_scope.cancel()

            with trio.fail_after(9):
                nursery.start_soon(flood_until_cut_off)
                while not nursery.cancel_scope.cancel_called:
                    assert await client.request("device.show") == []


async def test_too_many_clients_are_refused_and_told(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        idle = [await raw(daemon) for _ in range(server_module.CLIENT_LIMIT)]
        async with control(daemon) as one_more:
            with pytest.raises(BusyError, match="more than 64"):
                await one_more.request("tree")
        await idle.pop().aclose()
        with trio.fail_after(10):
            while True:
                async with control(daemon) as client:
                    try:
                        await client.request("tree")
                    except BusyError:
                        continue  # it has not seen the other leave yet
                    break
        for stream in idle:
            await stream.aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """R11: only the daemon's user and root may manage it, whatever the file's mode."""
    script = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); os.chdir(sys.argv[1])\n"
        "os.setuid(65534); s.connect('control.sock')\n"
        "while data := s.recv(4096): sys.stdout.buffer.write(data)\n"
    )
    async with running(tmp_path) as daemon:
        assert stat.S_IMODE(daemon.control_path.stat().st_mode) == 0o600
        daemon.control_path.chmod(0o666)
        daemon.runtime_dir.chmod(0o755)
        done = await trio.run_process(
            [sys.executable, "-c", script, str(daemon.runtime_dir)], capture_stdout=True
        )
        [body] = wire.Frames().feed(done.stdout)
        failure = wire.to_answer(body).error
        assert failure is not None
        assert failure.errno == "EPERM"
        assert "uid 65534 refused" in caplog.text


async def test_without_a_daemon_the_client_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"nobody\.sock"):
        async with ControlClient(tmp_path / "nobody.sock"):
            pass


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", UnreachableError),
        (wire.encode(wire.Answer(9, result=1)), ProtocolError),
        (b"\x01\x00\x00\x00\xc1", ProtocolError),
    ],
)
async def test_the_client_does_not_believe_everything(
    tmp_path: Path, said: bytes, error: type[VbusError]
) -> None:
    path = str(tmp_path / "sock")
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(path)
        listener.listen()
        async with ControlClient(path) as client:
            peer, _ = await listener.accept()
            with peer:
                await peer.send(said)
                peer.shutdown(socket.SHUT_WR)
                with trio.fail_after(10), pytest.raises(error):
                    await client.request("tree")


async def test_what_is_no_socket_at_the_path_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    precious = tmp_path / "run/control.sock"
    precious.write_text("precious")
    with pytest.RaisesGroup(ExistsError, flatten_subgroups=True, allow_unwrapped=True):
        async with running(tmp_path):
            pytest.fail("it started")
    assert precious.read_text() == "precious"


def test_an_id_of_any_size_is_answered_with_itself() -> None:
    request = wire.to_request(msgpack.packb({"version": 1, "id": 2**63, "op": "tree"}))
    assert request.id == 2**63
