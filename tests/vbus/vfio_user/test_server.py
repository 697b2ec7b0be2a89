"""The socket: whose it is, one client at a time, the next one, and nothing leaks."""

import errno
import os
import signal
import socket
import stat
import struct

import pytest
import trio

from vbus.errors import BusyError, ExistsError
from vbus.pci.constants import Irq, Offset, Region
from vbus.vfio_user import wire
from vbus.vfio_user.server import VfioUserServer
from vbus.vfio_user.wire import Command, IrqSetFlag

NOBODY = 65534


async def test_socket_can_be_opened_by_its_owner_only(bench):
    """R51."""
    mode = os.stat(bench.path).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
async def test_socket_is_given_to_the_guests_user(nursery, tmp_path, bench):
    path = tmp_path / "given.sock"
    server = VfioUserServer(bench.function, path, owner_uid=NOBODY)
    await nursery.start(server.serve)
    about = os.stat(path)
    assert (about.st_uid, stat.S_IMODE(about.st_mode)) == (NOBODY, 0o600)


async def test_second_client_is_told_that_the_function_is_in_use(bench, client):
    second = await bench.connect()
    body = wire.Version(0, 1).pack()
    assert await second.refused(Command.VERSION, body) == errno.EBUSY
    assert await second.ended()
    assert await client.read(0, 0, 1) == b"\0"
    counters = bench.server.statistics()
    assert (counters.clients, counters.refused) == (1, 1)


async def test_next_client_finds_the_function_as_new(bench, memfd):
    """Also one that connects before the server saw the other leave."""
    for _ in range(20):
        client = await bench.attach()
        assert await client.read(Region.CONFIG, Offset.COMMAND, 2) == b"\0\0"
        assert bench.function.memory.regions() == []
        await client.map(0, 4096, memfd)
        await client.write(Region.CONFIG, Offset.COMMAND, b"\6\0")
        client.sock.close()
    counters = bench.server.statistics()
    assert (counters.clients, counters.refused) == (20, 0)
    await client.leave(bench.server)
    assert bench.function.seen("attach") == bench.function.seen("detach") == [()] * 20


async def test_client_that_leaves_keeps_nothing(bench, memfd, eventfds, open_fds):
    """Memory, eventfds, sockets: R50, R51."""
    fds = eventfds(8)
    before = open_fds()
    for _ in range(200):
        client = await bench.attach()
        await client.map(0, 4096, memfd)
        await client.map(1 << 32, 4096)
        body = wire.SetIrqs(
            IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER, Irq.MSIX, 0, 8
        ).pack()
        await client.ask(Command.DEVICE_SET_IRQS, body, fds)
        await client.leave(bench.server)
    assert open_fds() == before
    assert bench.function.memory.regions() == []
    assert bench.function.memory.statistics().mapped_bytes == 0


async def test_client_that_dies_in_the_middle_of_a_message_leaks_nothing(
    bench, memfd, open_fds
):
    before = open_fds()
    for cut in (1, 15, 16, 17, 40):
        client = await bench.attach()
        _, data = client.wire.request(
            Command.DMA_MAP, wire.DmaMap(3, 0, 0, 4096).pack()
        )
        rights = struct.pack("i", memfd)
        await client.sock.sendmsg(
            [data[:cut]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        await client.leave(bench.server)
    assert open_fds() == before


async def test_message_in_single_bytes_is_understood(client):
    body = wire.RegionAccess(0, 0, 4).pack()
    _, data = client.wire.request(Command.REGION_READ, body)
    for at in range(len(data)):
        await client.sock.send(data[at : at + 1])
    assert not (await client.message()).failed


async def test_descriptor_belongs_to_its_own_message_in_a_pipeline(
    bench, client, memfd
):
    """Sent without waiting for replies, as QEMU does."""
    for index in range(64):
        fds = [memfd] if index % 2 else []
        body = wire.DmaMap(3, 0, index * 4096, 4096).pack()
        await client.send(Command.DMA_MAP, body, fds)
    for _ in range(64):
        assert not (await client.message()).failed
    backed = [region.backed for region in bench.function.memory.regions()]
    assert backed == [False, True] * 32


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff" * 64, id="ones"),
        pytest.param(bytes(64), id="zeros"),
        pytest.param(struct.pack("<HHIII", 1, 9, 15, 0, 0), id="short size"),
        pytest.param(struct.pack("<HHIII", 1, 9, 1 << 31, 0, 0), id="huge size"),
        pytest.param(struct.pack("<HHIII", 1, 9, 16, 2, 0), id="unknown type"),
        pytest.param(struct.pack("<HHIII", 1, 9, 16, 1, 0), id="reply to nothing"),
    ],
)
async def test_garbage_ends_that_connection_and_no_more(bench, client, data):
    await client.sock.send(data)
    assert await client.ended()
    assert bench.server.statistics().protocol_errors == 1
    following = await bench.attach()
    assert await following.read(0, 0, 1) == b"\0"


async def test_errors_are_counted_but_not_logged_for_ever(bench, client, caplog):
    for _ in range(100):
        await client.refused(99)
    assert bench.server.statistics().errors == 100
    assert len([r for r in caplog.records if "refused" in r.getMessage()]) == 20


async def test_function_that_fails_to_forget_does_not_stop_the_server(
    bench, client, caplog
):
    def detach():
        raise RuntimeError("stuck")

    bench.function.detach = detach
    await client.leave(bench.server)
    assert "stuck" in caplog.text
    del bench.function.detach
    assert await (await bench.attach()).read(0, 0, 1) == b"\0"


async def test_socket_of_a_dead_server_is_taken_over(nursery, tmp_path, bench):
    path = tmp_path / "stale.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    await nursery.start(VfioUserServer(bench.function, path).serve)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


async def test_socket_of_a_living_server_is_left_alone(bench):
    with pytest.raises(BusyError, match="answers"):
        await VfioUserServer(bench.function, bench.path).serve()
    assert await (await bench.attach()).read(0, 0, 1) == b"\0"


async def test_file_that_is_no_socket_is_left_alone(bench, tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(ExistsError, match="no socket"):
        await VfioUserServer(bench.function, path).serve()
    assert path.read_text() == "data"


async def test_socket_is_gone_when_the_server_is(tmp_path, bench, open_fds):
    path = tmp_path / "short.sock"
    before = open_fds()
    async with trio.open_nursery() as inner:
        await inner.start(VfioUserServer(bench.function, path).serve)
        assert path.exists()
        inner.cancel_scope.cancel()
    assert not path.exists()
    assert open_fds() == before


async def test_cancelled_server_lets_its_client_go(tmp_path, bench, memfd):
    path = tmp_path / "short.sock"
    async with trio.open_nursery() as inner:
        server = VfioUserServer(bench.function, path)
        await inner.start(server.serve)
        bench.path = path
        client = await bench.attach()
        await client.map(0, 4096, memfd)
        inner.cancel_scope.cancel()
    assert await client.ended()
    assert bench.function.memory.regions() == []
    assert bench.function.seen("detach") == [()]


def connect_as(uid, path):
    """In a forked child of another user: what does the server answer?"""
    child = os.fork()
    if child:
        return child
    code = 255
    try:
        os.setgid(uid)
        os.setuid(uid)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        _, data = wire.Connection().request(Command.VERSION, wire.Version(0, 1).pack())
        sock.sendall(data)
        header = sock.recv(16)
        code = struct.unpack("<HHIII", header)[4]
        code = code if sock.recv(1) == b"" else 254
    finally:
        os._exit(code)


async def exit_status(child):
    with trio.fail_after(10):
        _, status = await trio.to_thread.run_sync(os.waitpid, child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
async def test_client_of_another_user_is_refused_and_told_so(
    nursery, tmp_path, bench, caplog
):
    """R51: even with the file's mode out of the way, credentials decide."""
    os.chmod(bench.path, 0o666)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == 0 and parent.name.startswith(
            ("test", "pytest", "popen")
        ):
            os.chmod(parent, 0o755)
    child = connect_as(NOBODY, bench.path)
    assert await exit_status(child) == errno.EACCES
    assert bench.server.statistics().refused == 1
    assert bench.server.statistics().clients == 0
    assert f"uid {NOBODY} refused" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
async def test_only_the_users_named_may_attach(nursery, tmp_path, bench):
    """Not even our own, when the socket is a guest's."""
    path = tmp_path / "theirs.sock"
    server = VfioUserServer(bench.function, path, owner_uid=NOBODY)
    await nursery.start(server.serve)
    bench.path = path
    client = await bench.connect()
    body = wire.Version(0, 1).pack()
    assert await client.refused(Command.VERSION, body) == errno.EACCES


async def test_flood_of_refused_clients_is_cut_short(bench, client):
    """Those beyond a few are closed at once, so they cannot use up descriptors."""
    waiting = [await bench.connect() for _ in range(8)]
    await client.read(0, 0, 1)
    while bench.server.statistics().refused < 8:
        await trio.lowlevel.checkpoint()
    one_more = await bench.connect()
    assert await one_more.ended()
    body = wire.Version(0, 1).pack()
    assert await waiting[0].refused(Command.VERSION, body) == errno.EBUSY


async def test_refused_client_that_says_nothing_is_dropped(
    bench, client, autojump_clock
):
    second = await bench.connect()
    assert await second.ended()


async def test_server_that_looks_before_it_sleeps_serves_the_same(
    nursery, tmp_path, bench
):
    path = tmp_path / "spin.sock"
    server = VfioUserServer(bench.function, path, spin_us=200)
    await nursery.start(server.serve)
    bench.path = path
    client = await bench.attach()
    for _ in range(50):
        assert await client.read(0, 0, 1) == b"\0"
    await client.leave(server)


async def test_killed_client_is_noticed(bench, memfd):
    """A guest that dies by SIGKILL leaves the function to the next one."""
    parent, child_end = socket.socketpair()
    child = os.fork()
    if not child:
        try:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(bench.path))
            _, data = wire.Connection().request(
                Command.VERSION, wire.Version(0, 1).pack()
            )
            sock.sendall(data)
            sock.recv(4096)
            child_end.send(b"x")
            signal.pause()
        finally:
            os._exit(0)
    parent.setblocking(False)
    await trio.lowlevel.wait_readable(parent)
    parent.close()
    child_end.close()
    assert bench.server.statistics().peer.pid == child
    os.kill(child, signal.SIGKILL)
    assert await exit_status(child) == -signal.SIGKILL
    client = await bench.attach()
    assert await client.read(0, 0, 1) == b"\0"
