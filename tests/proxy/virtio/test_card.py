"""The card's driver against the real model: two cards on one switch, no kernel."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from proxy.bridge import BridgeDriver
from proxy.virtio.card import Card
from tests.proxy.host import Host, hosted, until
from tests.proxy.virtio.guests import CLASSES, found, guest_of

MAC = {"a": "02:00:00:00:00:0a", "b": "02:00:00:00:00:0b"}
HEADER = bytes(10) + b"\1\0"


@asynccontextmanager
async def card_on(
    bridge: BridgeDriver, name: str, *, offload: bool, packed: bool
) -> AsyncIterator[Card]:
    async with found(bridge, name) as device:
        card = Card(device)
        await card.start(offload=offload, packed=packed)
        yield card


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with hosted(tmp_path, CLASSES) as host:
        host.add("lan0", "switch")
        for name, mac in MAC.items():
            host.add(name, "net", switch="lan0", mac=mac, mtu=1400)
        yield host


def frame(sender: str, receiver: str, body: bytes) -> bytes:
    both = MAC[receiver] + MAC[sender]
    return bytes.fromhex(both.replace(":", "")) + b"\x88\xb5" + body


async def take(card: Card, count: int) -> list[bytes]:
    taken: list[bytes] = []
    while len(taken) < count:
        for pieces in await card.receive():
            taken.append(b"".join(pieces)[len(HEADER) :])
        card.done()
    return taken


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("offload", [False, True], ids=["plain", "offload"])
async def test_frames_cross_whole_and_in_order(
    host: Host, offload: bool, packed: bool
) -> None:
    """R13, R12: more than the rings hold, of every size, from card to card."""
    rng = random.Random(1)
    sent = [frame("a", "b", rng.randbytes(rng.randrange(46, 1400))) for _ in range(150)]
    async with guest_of(host) as bridge:
        options = {"offload": offload, "packed": packed}
        async with (
            card_on(bridge, "a", **options) as a,
            card_on(bridge, "b", **options) as b,
        ):
            assert (str(a.mac), a.mtu, a.link) == (MAC["a"], 1400, True)
            assert a.offloads == offload
            got: list[bytes] = []
            for _ in range(4):
                for each in sent:
                    await a.room()
                    a.send(HEADER + each)
                    a.flush()
                got += await take(b, len(sent))
            assert got == 4 * sent
            assert a.statistics().tx_frames == b.statistics().rx_frames == 600


async def test_what_has_no_room_waits_for_it(host: Host) -> None:
    async with guest_of(host) as bridge:
        options = {"offload": True, "packed": False}
        async with card_on(bridge, "a", **options) as a:
            large = HEADER + frame("a", "b", bytes(5000))
            sent = 0
            while not a.full:
                a.send(large)
                sent += 1
            assert sent == 24
            a.flush()
            with trio.fail_after(5):
                await a.room()
            assert not a.full


async def test_the_link_is_followed(host: Host) -> None:
    """5.1.4: status, by the configuration's signal."""
    async with guest_of(host) as bridge:
        options = {"offload": True, "packed": False}
        async with card_on(bridge, "a", **options) as a, trio.open_nursery() as nursery:
            changes: list[None] = []
            nursery.start_soon(a.device.watch, lambda: changes.append(None))
            host.model.device("a").model.set_link(False)  # type: ignore[attr-defined]
            await until(lambda: changes)
            await a.read_config()
            assert not a.link
            nursery.cancel_scope.cancel()
