"""A daemon that replaces itself under a machine, whose QEMU cannot reconnect."""

import json
import signal
import statistics as stats
import time

import trio

from tests.netns import isolated
from tests.system.served import Served
from tests.vm.conftest import Boot, Daemon
from tests.vm.test_guest_run import (
    CONFIG,
    GUEST,
    HOST,
    MB,
    PORT,
    UPLINK,
    WITHIN_S,
    receive,
    running,
    send,
    told,
)
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine

REPLACEMENTS = 3


def call_echo(count: int) -> list[float]:
    """In the guest: call echo0 over one connection, and how long each call took."""
    import time

    import trio

    from proxy.guest import attach
    from proxy.linux.function import choose

    async def main() -> list[float]:
        times = []
        async with attach(choose(None).address) as bridge:
            echo = await bridge.open("echo0")
            for number in range(count):
                began = time.monotonic()
                data = number.to_bytes(8, "little")
                _, answer = await echo.call(0, data)
                assert answer == data, number
                times.append(time.monotonic() - began)
                await trio.sleep(0.01)
        return times

    return trio.run(main)


async def replaced(served: Served, times: int) -> float:
    """Have it replaced, and give the seconds until it was ready again."""
    began = time.monotonic()
    served.process.send_signal(signal.SIGUSR2)
    with trio.fail_after(WITHIN_S):
        await trio.to_thread.run_sync(wait_until_ready, served, times + 1)
    return time.monotonic() - began


def wait_until_ready(served: Served, times: int) -> None:
    while served.log.read_bytes().count(b"ready in") < times:
        assert served.process.poll() is None, served.log.read_text()
        time.sleep(0.01)


async def test_calls_go_on_over_the_connection_of_before(
    daemon: Daemon, boot: Boot
) -> None:
    """R60: one handle, opened once, through several lives of the daemon."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1"), iommu=None) as vm:
        before = await vm.python(call_echo, 20)
        took: list[float] = []
        calls: list[list[float]] = []
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def call() -> None:
                calls.append(await vm.python(call_echo, 1000))

            await served_until_open(served)
            for number in range(REPLACEMENTS):
                took.append(await replaced(served, number + 1))
                (guest,) = served.ask("guest", "show", "vm1")
                assert guest["connections"] == ["echo0"]
        print(
            f"signal to ready: {stats.median(took):.2f} s;"
            f" longest call {max(calls[0]):.2f} s, before {max(before):.3f} s"
        )
        after = await vm.python(call_echo, 20)
        assert len(after) == 20


async def served_until_open(served: Served) -> None:
    """Wait until the guest has echo0 open."""
    with trio.fail_after(WITHIN_S):
        while True:
            (guest,) = served.ask("guest", "show", "vm1")
            if guest["connections"]:
                return
            await trio.sleep(0.05)


@isolated
async def test_an_interface_goes_on_unaware(daemon: Daemon, boot: Boot) -> None:
    """R60: TCP through venet meanwhile, and the guest is told nothing."""
    with daemon(CONFIG + UPLINK) as served:
        await interface_through_replacements(served, boot)


async def interface_through_replacements(served: Served, boot: Boot) -> None:
    async with (
        boot(served.socket("vm1"), iommu=None) as vm,
        running(vm, "--address", f"lan0-vm1={GUEST}/24") as process,
    ):
        await told(process, name="lan0-vm1", state="running")
        for number in range(REPLACEMENTS):
            took = await transfer_meanwhile(vm, served, number)
            print(f"signal to ready {took:.2f} s")
        ping = (await vm.run("ping", "-c", "3", "-i", "0.2", HOST)).stdout
        assert " 0% packet loss" in ping
        assert await events_until_statistics(process) == []


async def transfer_meanwhile(vm: VirtualMachine, served: Served, number: int) -> float:
    """Send through the interface, have the daemon replaced under way."""
    (listener,) = await trio.open_tcp_listeners(PORT, host=HOST)
    sums: list[str] = []
    took = 0.0
    async with listener, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            sums.append(await vm.python(send, HOST, PORT, 256 * MB))

        @nursery.start_soon
        async def replace() -> None:
            nonlocal took
            took = await replaced(served, number + 1)

        with trio.fail_after(2 * WITHIN_S):
            received, checksum = await receive(listener)
    assert (received, [checksum]) == (256 * MB, sums)
    return took


async def events_until_statistics(process: GuestProcess) -> list[str]:
    """What it was told about devices since its interface was up."""
    process.signal(signal.SIGUSR1)
    told_of = []
    with trio.fail_after(WITHIN_S):
        async for line in process:
            event = json.loads(line)
            if event["event"] == "statistics":
                return told_of
            if event["event"] == "device" and event["name"] == "lan0-vm1":
                told_of.append(line)
    raise AssertionError("it has ended")
