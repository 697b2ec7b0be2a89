"""A guest that is measured: `python -m proxy.trials --devices N WHERE...`.

Attaches to one function, or to several one after the other, and waits for N echo
devices; with a line on stdin it goes on. It tries them and prints what that took, one
JSON object per line. Then it holds all devices open with their rings, and tells of each
that comes or goes. Each further line on stdin names one more function to attach to; the
end of stdin ends it.

It measures; what is compared with what, and who starts it, is not its business.
"""

import os
import resource
import sys
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from random import Random

import click
import msgspec
import trio

from proxy.bridge import BridgeDriver
from proxy.device import DeviceProxy, NorthConsumer, NorthProducer
from proxy.guest import attach
from vbus.abi import QUEUE_LIMIT

ECHO, REQUESTS, REPLIES = 0, 0, 1
SLOTS, SLOT_SIZE = 8, 64
MESSAGE = bytes(48)
MEMORY_MIB, MEMORY_EACH_MIB = 64, 1
URGENT = QUEUE_LIMIT - 1
CALLS = TRIPS = 200
MESSAGES, URGENT_TRIPS = 2048, 150
MOST_BUSY = 32
"""So many devices at most have messages under way at once."""
IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128)


def say(trial: str, **about: object) -> None:
    """Print a result."""
    sys.stdout.buffer.write(msgspec.json.encode({"trial": trial, **about}) + b"\n")
    sys.stdout.buffer.flush()


def now_us() -> float:
    """Give a time that only goes forward."""
    return time.perf_counter() * 1e6


class Exchange:
    """An open echo device with its two rings."""

    def __init__(self, requests: NorthProducer, replies: NorthConsumer) -> None:
        self._requests = requests
        self._replies = replies
        self._answer = bytearray(SLOTS * SLOT_SIZE)
        self._sizes = array("I", [0] * SLOTS)

    @classmethod
    async def open(cls, device: DeviceProxy, prio: int = 0) -> "Exchange":
        """Open a device and share both rings; closing it is the caller's."""
        await device.open()
        return cls(
            await device.producer(REQUESTS, SLOTS, slot_size=SLOT_SIZE, prio=prio),
            await device.consumer(REPLIES, SLOTS, slot_size=SLOT_SIZE, prio=prio),
        )

    async def send(self, count: int) -> None:
        """Send so many messages."""
        await self._requests.send(MESSAGE * count, array("I", [len(MESSAGE)] * count))

    async def receive(self) -> int:
        """Take what came back, one at least; give how many."""
        return await self._replies.receive(self._answer, self._sizes)

    async def trip(self) -> float:
        """Send one message and wait for it; give the time in us."""
        began = now_us()
        await self.send(1)
        await self.receive()
        return now_us() - began

    async def keep_busy(self, window: int, count: int) -> None:
        """Have `window` messages under way until `count` have come back."""
        sent = min(window, count)
        await self.send(sent)
        back = 0
        while back < count:
            got = await self.receive()
            back += got
            if more := min(got, count - sent):
                await self.send(more)
                sent += more


class Guest:
    """Functions with all devices behind one of them, or one device behind each."""

    def __init__(self, *, each: bool) -> None:
        self._each = each
        self.bridges: list[BridgeDriver] = []

    async def plug(self, where: str, stack: AsyncExitStack) -> BridgeDriver:
        """Attach to one more function, as long as `stack` stands.

        With a device each it keeps to the original protocol: one queue, one vector.
        """
        attaching = attach(
            where,
            memory_mib=MEMORY_EACH_MIB if self._each else MEMORY_MIB,
            compat=self._each,
        )
        bridge = await stack.enter_async_context(attaching)
        self.bridges.append(bridge)
        return bridge

    async def devices(self, count: int) -> list[DeviceProxy]:
        """Wait until so many devices are known."""
        each = range(count // len(self.bridges))
        return [
            await bridge.device(number) for bridge in self.bridges for number in each
        ]

    @property
    def interrupts(self) -> int:
        """Taken so far, over all functions."""
        return sum(one.statistics().interrupts.total for one in self.bridges)

    @property
    def vectors(self) -> int:
        """Given to all functions."""
        return sum(len(one.statistics().interrupts.by_vector) for one in self.bridges)


async def try_calls(devices: Sequence[DeviceProxy]) -> None:
    """Open, call and close each; then call one again and again."""
    began = now_us()
    for device in devices:
        async with device.opened():
            await device.call(ECHO, MESSAGE)
    say("visited", us=(now_us() - began) / len(devices))
    times = []
    async with devices[0].opened():
        for _ in range(CALLS):
            began = now_us()
            await devices[0].call(ECHO, MESSAGE)
            times.append(now_us() - began)
    say("called", us=middle(times))


async def try_rings(
    guest: Guest, devices: Sequence[DeviceProxy], *, loaded: bool
) -> None:
    """Round trips; if it is to be `loaded`, rising load and an urgent device in it."""
    busy = [await Exchange.open(device) for device in devices]
    say("tripped", us=middle([await busy[0].trip() for _ in range(TRIPS)]))
    for in_flight in IN_FLIGHT if loaded else ():
        if in_flight <= len(busy) * SLOTS // 2:
            await load(guest, busy, in_flight)
    await close(devices)
    if loaded and len(devices) > 1:
        await urgent(devices, first=False)
        await urgent(devices, first=True)


async def load(guest: Guest, busy: Sequence[Exchange], in_flight: int) -> None:
    """Have so many messages under way, spread over the devices."""
    used = busy[:in_flight]
    window, count = in_flight // len(used), MESSAGES // len(used)
    interrupts, began = guest.interrupts, now_us()
    async with trio.open_nursery() as nursery:
        for exchange in used:
            nursery.start_soon(exchange.keep_busy, window, count)
    took, total = now_us() - began, count * len(used)
    say(
        "loaded",
        devices=len(used),
        in_flight=in_flight,
        interrupts=1000 * (guest.interrupts - interrupts) / total,
        messages=1e6 * total / took,
    )


async def urgent(devices: Sequence[DeviceProxy], *, first: bool) -> None:
    """One device's round trip now and then, while the others are flooded.

    With `first` its events have the highest priority, else that of the others.
    """
    one = await Exchange.open(devices[0], URGENT if first else 0)
    others = [await Exchange.open(device) for device in devices[1:]]
    random = Random(1)
    times = []
    async with trio.open_nursery() as nursery:
        for exchange in others:
            nursery.start_soon(exchange.keep_busy, SLOTS // 2, sys.maxsize)
        for _ in range(URGENT_TRIPS):
            await trio.sleep(random.uniform(0.0005, 0.0015))
            times.append(await one.trip())
        nursery.cancel_scope.cancel()
    await close(devices)
    high = sorted(times)[int(0.99 * (len(times) - 1))]
    say("urgent", first=first, us=middle(times), high_us=high)


async def close(devices: Sequence[DeviceProxy]) -> None:
    for device in devices:
        await device.close()


def middle(times: list[float]) -> float:
    """Give the median."""
    return sorted(times)[len(times) // 2]


async def hold(
    guest: Guest, devices: Sequence[DeviceProxy], told: AsyncIterator[str]
) -> None:
    """Keep all open, and welcome what comes, until there are no more lines."""
    for device in devices:
        await Exchange.open(device)
    say("held")
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        first, known = guest.bridges[0], len(devices) // len(guest.bridges)
        nursery.start_soon(newcomers, nursery, first, known)
        async for where in told:
            bridge = await guest.plug(where, stack)
            nursery.start_soon(welcome, await bridge.device(0))
        nursery.cancel_scope.cancel()


async def newcomers(nursery: trio.Nursery, bridge: BridgeDriver, number: int) -> None:
    """Welcome each device from id `number` on: they count up, whatever goes."""
    while True:
        nursery.start_soon(welcome, await bridge.device(number))
        number += 1


async def welcome(device: DeviceProxy) -> None:
    """Tell of a device once it has answered a call, and once it is gone."""
    async with device.opened():
        await device.call(ECHO, MESSAGE)
    say("plugged", name=device.name)
    await device.gone.wait()
    say("unplugged", name=device.name)


async def lines() -> AsyncGenerator[str, None]:
    """Give the lines of stdin."""
    rest = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        async for chunk in stream:
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                yield line.decode()


async def run(count: int, places: Sequence[str], *, each: bool, loaded: bool) -> None:
    """All trials, one after the other."""
    async with aclosing(lines()) as told, AsyncExitStack() as stack:
        guest = Guest(each=each)
        began = now_us()
        for where in places:
            await guest.plug(where, stack)
        devices = await guest.devices(count)
        took = now_us() - began
        say("attached", us=took, functions=len(places), vectors=guest.vectors)
        await anext(told, None)
        await try_calls(devices)
        await try_rings(guest, devices[:MOST_BUSY], loaded=loaded)
        await hold(guest, devices, told)


@click.command()
@click.option("--devices", type=click.IntRange(1), required=True)
@click.option("--each", is_flag=True, help="A device behind each function.")
@click.option("--load", "loaded", is_flag=True, help="Try rising load as well.")
@click.argument("places", metavar="WHERE...", nargs=-1, required=True)
def main(devices: int, each: bool, loaded: bool, places: tuple[str, ...]) -> None:
    """Be a guest that is measured."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    trio.run(partial(run, devices, places, each=each, loaded=loaded))


if __name__ == "__main__":
    main()
