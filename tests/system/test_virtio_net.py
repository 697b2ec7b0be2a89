"""virtio-net behind the bridge of host processes: TCP with checksums, all processes."""

from functools import partial
from pathlib import Path

from tests.netns import isolated
from tests.system.served import Served
from tests.transfer import here, in_network, process_guest, transfer

HOST, CARD, OTHER, VENET = "10.9.0.1", "10.9.0.2", "10.9.0.3", "10.9.0.4"
FUNCTION = "10.9.0.5"
CONFIG = f"""
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "up0"
class = "switch-tap"
switch = "lan0"
ifname = "lan0"
address = "{HOST}/24"
""" + "".join(
    f"""
[[bus]]
name = "{name}"
[[device]]
name = "{name}"
class = "{kind}"
bus = "{name}"
switch = "lan0"
[[guest]]
name = "{name}"
bus = "{name}"
"""
    for name, kind in (("card", "virtio-net"), ("other", "virtio-net"), ("ve", "venet"))
)
FUNCTION_CONFIG = """
[[device]]
name = "fn0"
class = "virtio-net"
switch = "lan0"
expose = "pci"
"""
SIZE = 32 << 20


@isolated
async def test_tcp_is_whole_between_cards_venets_and_the_host(tmp_path: Path) -> None:
    """R13, R12: two cards and a venet on one switch with the host, both ways."""
    with Served(tmp_path, CONFIG) as served:
        async with (
            process_guest(served, "card", f"card={CARD}/24") as card,
            process_guest(served, "other", f"other={OTHER}/24") as other,
            process_guest(served, "ve", f"ve={VENET}/24") as venet,
        ):
            at_card, at_other, at_venet = (
                partial(here, prefix=prefix) for prefix in (card, other, venet)
            )
            await transfer(at_card, at_venet, VENET, "card to venet", SIZE)
            await transfer(at_venet, at_card, CARD, "venet to card", SIZE)
            await transfer(at_card, at_other, OTHER, "card to card", SIZE)
            await transfer(at_card, here, HOST, "card to host", SIZE)
            await transfer(here, at_card, CARD, "host to card", SIZE)
            counted = served.ask("stats", "devices/card")
            sent = counted["io"]["tx_bytes"] / counted["io"]["tx_frames"]
            assert sent > 20_000  # segmentation is left to the last one
            assert counted["adapter"]["kicks"] <= counted["io"]["tx_frames"]


@isolated
async def test_tcp_is_whole_between_a_bridge_and_a_function(tmp_path: Path) -> None:
    """R62: one card behind a guest's bridge, one that is a function, on one switch."""
    with Served(tmp_path, CONFIG + FUNCTION_CONFIG) as served:
        socket = str(served.runtime / "functions" / "fn0.sock")
        words = ("tests.system.function_guest", socket, f"fn0={FUNCTION}/24")
        async with (
            process_guest(served, "card", f"card={CARD}/24") as card,
            in_network(*words) as function,
        ):
            at_card, at_function = (
                partial(here, prefix=prefix) for prefix in (card, function)
            )
            await transfer(at_card, at_function, FUNCTION, "bridge to function", SIZE)
            await transfer(at_function, at_card, CARD, "function to bridge", SIZE)
