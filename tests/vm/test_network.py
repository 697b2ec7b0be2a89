"""Two virtual machines and a host-process guest on one switch, and the host beside."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from tests.netns import isolated
from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from tests.vm.test_guest_run import MB, running, statistics, told
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine

HOST = "10.87.4.1"
ADDRESSES = {"vm1": "10.87.4.11", "vm2": "10.87.4.12", "p3": "10.87.4.13"}
CONFIG = f"""
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "uplink0"
class = "switch-tap"
switch = "lan0"
ifname = "vbnet0"
address = "{HOST}/24"
""" + "".join(
    f"""
[[bus]]
name = "{name}"
[[device]]
name = "net-{name}"
class = "venet"
bus = "{name}"
switch = "lan0"
[[guest]]
name = "{name}"
bus = "{name}"
"""
    for name in ADDRESSES
)
SIZE = 256 * MB
PORT = 5301
WITHIN_S = 120

Call = Callable[..., Awaitable[str]]


def send(host: str, port: int, size: int) -> str:
    """Send so many bytes, and give their checksum. Runs anywhere, alone."""
    import os
    import socket
    import time
    import zlib

    block, state = os.urandom(1 << 20), 0
    end = time.monotonic() + 30
    while True:
        try:
            sock = socket.create_connection((host, port), 5)
            break
        except OSError:  # the sink is about to listen
            if time.monotonic() > end:
                raise
    with sock:
        for number in range(size >> 20):
            part = number.to_bytes(8, "little") + block[8:]
            state = zlib.crc32(part, state)
            sock.sendall(part)
    return f"{size} {state:08x}"


def receive(port: int) -> str:
    """Take one connection to its end; bytes and checksum. Runs anywhere, alone."""
    import socket
    import zlib

    state = size = 0
    with socket.create_server(("", port)) as server:
        server.settimeout(60)
        sock, _ = server.accept()
        with sock:
            while part := sock.recv(1 << 20):
                state = zlib.crc32(part, state)
                size += len(part)
    return f"{size} {state:08x}"


async def here(
    function: Callable[..., str], *arguments: object, prefix: tuple[str, ...] = ()
) -> str:
    """Run a function in a process of the host."""
    call = (
        "import sys, json; from tests.vm import test_network as m;"
        "print(getattr(m, sys.argv[1])(*json.loads(sys.argv[2])))"
    )
    words = [*prefix, sys.executable, "-c", call, function.__name__]
    done = await trio.run_process([*words, json.dumps(arguments)], capture_stdout=True)
    return done.stdout.decode().strip()


async def in_vm(
    vm: VirtualMachine, function: Callable[..., str], *arguments: object
) -> str:
    result: str = await vm.python(function, *arguments)
    return result


@asynccontextmanager
async def process_guest(served: Served, name: str) -> AsyncIterator[tuple[str, ...]]:
    """A host-process guest in a network of its own; gives how to run things there."""
    words = ("guest", "run", str(served.socket(name)), "--json")
    address = f"net-{name}={ADDRESSES[name]}/24"
    process = await trio.lowlevel.open_process(
        [
            "unshare",
            "--net",
            sys.executable,
            "-m",
            "vbus",
            *words,
            "--address",
            address,
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        said = b""
        with trio.fail_after(30):
            while b'"running"' not in said:
                said += await process.stdout.receive_some()
        yield ("nsenter", "--target", str(process.pid), "--net")
    finally:
        process.terminate()
        with trio.CancelScope(shield=True):
            await process.wait()
            assert process.stdout is not None
            await process.stdout.aclose()


async def transfer(source: Call, sink: Call, address: str, what: str) -> None:
    """256 MB arrive whole."""
    sums: dict[str, str] = {}

    async def take() -> None:
        sums["received"] = await sink(receive, PORT)

    began = trio.current_time()
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            sums["sent"] = await source(send, address, PORT, SIZE)
    seconds = trio.current_time() - began
    print(f"{what}: {SIZE * 8 / seconds / 1e9:.2f} Gbit/s with checksums at both ends")
    assert sums["received"] == sums["sent"]


async def bytes_per_frame(
    process: GuestProcess, name: str, since: int, size: int
) -> float:
    shown = await statistics(process)
    frames = shown["devices"][f"net-{name}"]["driver"]["frames"]["tx_frames"]
    return size / max(1, frames - since)


async def sent_frames(process: GuestProcess, name: str) -> int:
    shown = await statistics(process)
    frames: int = shown["devices"][f"net-{name}"]["driver"]["frames"]["tx_frames"]
    return frames


@isolated
async def test_bulk_tcp_is_whole_between_machines_processes_and_the_host(
    daemon: Daemon, boot: Boot
) -> None:
    """R15, R50, R61: every pair pings and moves 256 MB, in frames of up to 64 KiB."""
    # The isolated child ends its own daemon: the fixture ends nothing there.
    with daemon(CONFIG) as served:
        await every_pair(served, boot)


async def every_pair(served: Served, boot: Boot) -> None:
    async with (
        boot(served.socket("vm1")) as vm1,
        boot(served.socket("vm2"), iommu=None) as vm2,
        process_guest(served, "p3") as prefix,
        running(vm1, "--address", f"net-vm1={ADDRESSES['vm1']}/24") as first,
        running(vm2, "--address", f"net-vm2={ADDRESSES['vm2']}/24") as second,
    ):
        await told(first, name="net-vm1", state="running")
        await told(second, name="net-vm2", state="running")
        for address in (HOST, ADDRESSES["vm2"], ADDRESSES["p3"]):
            done = await vm1.run("ping", "-c", "3", "-W", "5", address)
            print(done.stdout.splitlines()[-1])
        at1, at2 = partial(in_vm, vm1), partial(in_vm, vm2)
        process = partial(here, prefix=prefix)
        before = await sent_frames(first, "vm1")
        await transfer(at1, here, HOST, "vm1 to host")
        mean = await bytes_per_frame(first, "vm1", before, SIZE)
        print(f"{mean:.0f} bytes a frame")
        assert mean > 20_000
        await transfer(here, at1, ADDRESSES["vm1"], "host to vm1")
        await transfer(at1, at2, ADDRESSES["vm2"], "vm1 to vm2")
        await transfer(at1, process, ADDRESSES["p3"], "vm1 to process")
        await transfer(process, at2, ADDRESSES["vm2"], "process to vm2")
