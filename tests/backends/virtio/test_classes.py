"""The device classes: attributes, what they own, and that any guest may be met."""

from pathlib import Path

import pytest
import trio
import trio.testing

from backends.venet import Switch
from backends.virtio.classes import (
    VirtioBlkDevice,
    VirtioConsoleDevice,
    VirtioNetDevice,
    VirtioRngDevice,
    parse_size,
)
from tests.netns import isolated
from vbus.bus import BusModel
from vbus.errors import BusyError, ExistsError, InvalidError, NotFoundError
from vbus.net import interface
from vbus.testing import check_device
from vbus.virtio.blk import Feature
from vbus.virtio.net import LINK_UP

CLASSES = {
    "blk": VirtioBlkDevice,
    "console": VirtioConsoleDevice,
    "net": VirtioNetDevice,
    "rng": VirtioRngDevice,
    "switch": Switch,
}


@pytest.fixture
def model() -> BusModel:
    return BusModel(CLASSES)


async def test_a_disk_conforms(tmp_path: Path) -> None:
    """R13: whatever a guest does to the adapter."""
    await check_device(VirtioBlkDevice, path=str(tmp_path / "disk"), size="1M")


async def test_a_console_conforms(tmp_path: Path) -> None:
    await check_device(VirtioConsoleDevice, to=["pty", f"log:{tmp_path}/log"])


async def test_a_source_of_entropy_conforms() -> None:
    await check_device(VirtioRngDevice)


async def test_a_network_card_conforms() -> None:
    def make(model: BusModel) -> VirtioNetDevice:
        model.classes |= {"switch": Switch, "net": VirtioNetDevice}
        model.add_device("sw", "switch")
        device = model.add_device("net0", "net", {"switch": "sw", "pairs": 2})
        assert isinstance(device, VirtioNetDevice)
        return device

    await check_device(make)


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("4k", 4096), ("2M", 2 << 20), (1024, 1024)]
)
def test_sizes_have_units(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["511", "-512", "1X", "", "0.5G"])
def test_sizes_that_are_no_whole_sectors_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"sectors|literal"):
        parse_size(text)


def test_an_image_is_made_once(model: BusModel, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    made = model.add_device("a", "blk", {"path": str(path), "size": "1M"})
    assert isinstance(made, VirtioBlkDevice)
    assert path.stat().st_size == 1 << 20
    assert path.stat().st_blocks == 0
    assert made.model.capacity == 2048
    model.remove_device("a")
    path.write_bytes(b"x" * 1024)
    again = model.add_device("a", "blk", {"path": str(path)})
    assert again.get_attribute("size") == 1024
    model.remove_device("a")
    with pytest.raises(InvalidError, match="has 1024 bytes, not 1048576"):
        model.add_device("a", "blk", {"path": str(path), "size": "1M"})
    with pytest.raises(NotFoundError):
        model.add_device("b", "blk", {"path": str(tmp_path / "none")})


def test_a_removed_disk_lets_go_of_its_image(model: BusModel, tmp_path: Path) -> None:
    attributes = {"path": str(tmp_path / "disk"), "size": "1M"}
    model.add_device("a", "blk", attributes)
    with pytest.raises(BusyError):
        model.add_device("b", "blk", attributes)
    model.remove_device("a")
    model.add_device("b", "blk", attributes)
    model.remove_device("b")


async def test_a_disk_that_is_served_lets_go_after_its_task(
    model: BusModel, tmp_path: Path
) -> None:
    device = model.add_device("a", "blk", {"path": str(tmp_path / "d"), "size": "1M"})
    assert isinstance(device, VirtioBlkDevice)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.serve)
        await trio.testing.wait_all_tasks_blocked()
        model.remove_device("a")
        assert device.model.image.fileno() >= 0
        nursery.cancel_scope.cancel()
    assert device.model.image.fileno() == -1


def test_a_disk_grows_and_does_not_shrink(model: BusModel, tmp_path: Path) -> None:
    device = model.add_device("a", "blk", {"path": str(tmp_path / "d"), "size": "1M"})
    assert isinstance(device, VirtioBlkDevice)
    model.set_attribute("a", "size", "2M")
    assert device.model.capacity == 4096
    assert (tmp_path / "d").stat().st_size == 2 << 20
    with pytest.raises(InvalidError, match="cannot shrink"):
        model.set_attribute("a", "size", "1M")
    with pytest.raises(InvalidError, match="too large"):
        model.set_attribute("a", "size", f"{1 << 22}T")
    assert device.get_attribute("size") == 2 << 20
    model.remove_device("a")


def test_a_disk_offers_what_its_attributes_say(model: BusModel, tmp_path: Path) -> None:
    def offered(**attributes: object) -> int:
        about = {"path": str(tmp_path / "d"), "size": "1M"} | attributes
        device = model.add_device("a", "blk", about)
        assert isinstance(device, VirtioBlkDevice)
        word = device.model.offered
        model.remove_device("a")
        return word

    plain = offered()
    assert plain >> Feature.FLUSH & 1
    assert plain >> Feature.DISCARD & 1
    through = offered(cache="writethrough")
    assert not through >> Feature.FLUSH & 1
    assert not through >> Feature.CONFIG_WCE & 1
    assert not offered(discard=False) >> Feature.DISCARD & 1
    assert offered(readonly=True) >> Feature.RO & 1
    with pytest.raises(InvalidError, match="cache"):
        offered(cache="none")
    with pytest.raises(InvalidError, match="serial"):
        offered(serial="x" * 21)


def test_a_card_keeps_its_address_reserved(model: BusModel) -> None:
    model.add_device("sw", "switch")
    mac = "02:00:00:00:00:01"
    model.add_device("a", "net", {"switch": "sw", "mac": mac})
    with pytest.raises(ExistsError):
        model.add_device("b", "net", {"switch": "sw", "mac": mac})
    with pytest.raises(BusyError):
        model.remove_device("sw")
    model.remove_device("a")
    model.add_device("b", "net", {"switch": "sw", "mac": mac})
    model.remove_device("b")


@pytest.mark.parametrize("attributes", [{}, {"switch": "sw", "ifname": "tap0"}])
def test_a_card_is_in_one_place(model: BusModel, attributes: dict[str, str]) -> None:
    model.add_device("sw", "switch")
    with pytest.raises(InvalidError, match="on a switch, or has a TAP"):
        model.add_device("a", "net", attributes)


@isolated
async def test_a_card_has_a_tap_to_itself(model: BusModel) -> None:
    """R15: the TAP is there with its address; once it is removed the link is down."""
    about = {"ifname": "card0", "address": "10.9.0.1/24", "mtu": 1400}
    device = model.add_device("a", "net", about)
    assert isinstance(device, VirtioNetDevice)
    assert interface.get_mtu("card0") == 1400
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.serve)
        await trio.testing.wait_all_tasks_blocked()
        assert device.model.config.number("status") == LINK_UP
        await trio.run_process(["ip", "link", "del", "card0"])
        with trio.fail_after(5):
            while device.model.config.number("status"):  # noqa: ASYNC110
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    model.remove_device("a")


def test_a_terminals_size_is_configuration(model: BusModel) -> None:
    device = model.add_device("con0", "console", {"terminal": "132x43"})
    assert isinstance(device, VirtioConsoleDevice)
    config = device.model.config
    assert (config.number("cols"), config.number("rows")) == (132, 43)
    model.set_attribute("con0", "terminal", "80x24")
    assert (config.number("cols"), config.number("rows")) == (80, 24)
    for wrong in ("80", "0x25", "axb"):
        with pytest.raises(InvalidError):
            model.set_attribute("con0", "terminal", wrong)
    model.remove_device("con0")


async def test_a_consoles_places_are_checked_and_found(
    model: BusModel, tmp_path: Path
) -> None:
    sock, log = tmp_path / "sock", tmp_path / "log"
    places = f"pty,unix:{sock},log:{log}"
    device = model.add_device("c", "console", {"to": places, "ports": "a,b,c"})
    assert isinstance(device, VirtioConsoleDevice)
    assert sock.is_socket()
    terminal = device.statistics().places[0]
    assert terminal.startswith("pty:/dev/pts/")
    assert [port.name for port in device.model.ports] == ["a", "b", "c"]
    model.remove_device("c")
    assert not sock.exists()
    for bad in ("tty", "unix:", "log"):
        with pytest.raises(InvalidError, match="to: "):
            model.add_device("c", "console", {"to": bad})
    with pytest.raises(InvalidError, match="1 names for 2 ports"):
        model.add_device("c", "console", {"to": "pty,pty", "ports": "one"})
