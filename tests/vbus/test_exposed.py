"""Devices that are PCI functions of their own (issue 4): sockets, refusals, order."""

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from proxy.memory import DmaMemory
from proxy.vfio_user import VfioUserClient, connect
from shm import AddressSpace
from vbus.bus import BusModel
from vbus.config import Exposure, exposure, parse
from vbus.control.client import ControlClient
from vbus.daemon import Daemon
from vbus.device import Device, attribute
from vbus.errors import (
    BusyError,
    ConfigError,
    InvalidError,
    NoDeviceError,
    VbusError,
    innermost,
)
from vbus.pci.config_space import Bar, ConfigSpace, Identity
from vbus.pci.function import ConfiguredFunction, PciFunction

LOG: list[str] = []
LAYOUT = "plain"
PCI = Exposure(LAYOUT)
ID = 0x4242


class Register(ConfiguredFunction):
    """A function with an id and a BAR, that notes its end."""

    def __init__(self) -> None:
        config = ConfigSpace(Identity(0x11DA, ID, 0xFF0000), {0: Bar(64)})
        super().__init__(config, AddressSpace())

    def close(self) -> None:
        LOG.append("function closed")


class Shown(Device):
    """Can be a function; its task fails when told."""

    type = "org.vbus.test.shown"
    uses = attribute(str, default="")

    def setup(self) -> None:
        self.fail = trio.Event()
        if self.uses:
            self.host.device(self.uses)

    async def serve(self) -> None:
        await self.fail.wait()
        raise ZeroDivisionError("a bug of the device")

    def teardown(self) -> None:
        LOG.append("torn down")

    def pci_function(self, layout: str, *, spin_us: float = 0) -> PciFunction:
        if layout != LAYOUT:
            raise InvalidError(f"no layout {layout!r}")
        return Register()


class OnBusOnly(Device):
    type = "org.vbus.test.bus"


@asynccontextmanager
async def running(folder: Path, text: str = "") -> AsyncIterator[Daemon]:
    LOG.clear()
    model = BusModel({"shown": Shown, "bus-only": OnBusOnly})
    daemon = Daemon(parse(text), folder / "run", model)
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.run)
        try:
            yield daemon
        finally:
            daemon.stop()


def socket_of(daemon: Daemon, name: str = "d0") -> Path:
    return daemon.runtime_dir / "functions" / f"{name}.sock"


@asynccontextmanager
async def attached(daemon: Daemon, name: str = "d0") -> AsyncIterator[VfioUserClient]:
    with DmaMemory(1 << 20) as memory, trio.fail_after(5):
        async with connect(socket_of(daemon, name), memory) as client:
            yield client


async def read_for_ever(client: VfioUserClient) -> None:
    while True:
        await client.config_read(0, 4)


EXPOSED = f"""
[[device]]
name = "d0"
class = "shown"
expose = "pci"
layout = "{LAYOUT}"
"""


async def test_an_exposed_device_is_a_function_on_a_socket_of_its_own(
    tmp_path: Path,
) -> None:
    """R14: one function per device, on no bus."""
    async with running(tmp_path, EXPOSED) as daemon:
        async with attached(daemon) as client:
            assert await client.config_read_u16(2) == ID
            assert daemon.exposed["d0"].server.attached
        assert list(daemon.model.links(daemon.model.device("d0"))) == []
        assert stat.S_IMODE(socket_of(daemon).stat().st_mode) == 0o600
    assert not socket_of(daemon).exists()
    assert LOG == ["function closed", "torn down"]


@pytest.mark.usefixtures("no_fd_leak")
async def test_removing_it_disconnects_the_client_before_the_device_ends(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as daemon:
        await daemon.add_device("d0", "shown", {}, exposure=PCI)
        async with attached(daemon) as client:
            await daemon.remove_device("d0")
            assert LOG == ["function closed", "torn down"]
            with pytest.raises(NoDeviceError):
                await client.config_read(0, 4)
        assert daemon.exposed == {}
        await daemon.add_device("d0", "shown", {}, exposure=PCI)
        async with attached(daemon) as client:
            assert await client.config_read_u16(2) == ID


async def test_a_device_that_others_use_stays_with_its_function(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        await daemon.add_device("d0", "shown", {}, exposure=PCI)
        await daemon.add_device("d1", "shown", {"uses": "d0"}, exposure=PCI)
        with pytest.raises(BusyError, match="used by d1"):
            await daemon.remove_device("d0")
        async with attached(daemon) as client:
            assert await client.config_read_u16(2) == ID


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.parametrize(
    ("kind", "layout", "said"),
    [
        ("bus-only", LAYOUT, "d0 can be shown on a bus only"),
        ("shown", "no-such", "no layout 'no-such'"),
    ],
)
async def test_what_cannot_be_exposed_is_not_left_behind(
    tmp_path: Path, kind: str, layout: str, said: str
) -> None:
    async with running(tmp_path) as daemon:
        with pytest.raises(InvalidError, match=said):
            await daemon.add_device("d0", kind, {}, exposure=Exposure(layout))
        assert daemon.model.devices == {}
        assert daemon.exposed == {}


async def test_a_socket_that_is_taken_refuses_the_device_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        socket_of(daemon).write_text("no socket")
        with pytest.raises(VbusError):
            await daemon.add_device("d0", "shown", {}, exposure=PCI)
        assert daemon.model.devices == {}
        assert LOG == ["function closed", "torn down"]
        await daemon.add_device("d1", "shown", {}, exposure=PCI)


async def test_an_exposed_device_is_put_on_no_bus(tmp_path: Path) -> None:
    async with (
        running(tmp_path, EXPOSED + '[[bus]]\nname = "bus0"\n') as daemon,
        ControlClient(daemon.control_path) as control,
    ):
        with pytest.raises(InvalidError, match="d0 is a PCI function of its own"):
            await control.request("device.link", bus="bus0", device="d0")
        with pytest.raises(InvalidError, match="leave bus0 out"):
            await control.request(
                "device.add", name="d1", class_name="shown", expose="pci",
                layout=LAYOUT, buses=["bus0"],
            )  # fmt: skip
        assert list(daemon.model.devices) == ["d0"]
        assert not daemon.model.bus("bus0").interfaces


async def test_how_it_is_exposed_is_shown_with_what_its_client_did(
    tmp_path: Path,
) -> None:
    async with (
        running(tmp_path, EXPOSED) as daemon,
        ControlClient(daemon.control_path) as control,
    ):
        async with attached(daemon) as client:
            await client.config_read(0, 4)
            [shown] = await control.request("device.show", name="d0")
            counted = await control.request("stats", path="functions/d0/memory")
        assert shown["expose"] == "pci"
        assert shown["layout"] == LAYOUT
        assert shown["socket"] == str(socket_of(daemon))
        assert shown["attached"] is True
        assert shown["since_attach"]["config_reads"] == 1
        assert counted["mapped_bytes"] == 1 << 20


async def test_a_device_whose_task_fails_takes_its_function_along(
    tmp_path: Path,
) -> None:
    """R60: nobody is left with a device that does nothing any more."""
    async with running(tmp_path, EXPOSED) as daemon:
        device = daemon.model.device("d0")
        assert isinstance(device, Shown)
        async with attached(daemon) as client:
            device.fail.set()
            with pytest.raises(NoDeviceError):
                await read_for_ever(client)
        await daemon.remove_device("d0")
        assert LOG == ["function closed", "torn down"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket away")
async def test_the_socket_belongs_to_the_user_that_is_named(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        shown = Exposure(LAYOUT, uid=65534)
        await daemon.add_device("d0", "shown", {}, exposure=shown)
        assert socket_of(daemon).stat().st_uid == 65534
        for folder in (daemon.runtime_dir, socket_of(daemon).parent):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o751


# Configuration


def device(*lines: str) -> str:
    return "\n".join(["[[device]]", 'name = "d0"', 'class = "shown"', *lines, ""])


def test_a_file_names_exposure_layout_and_user_beside_the_attributes() -> None:
    text = device(
        'expose = "pci"', 'layout = "legacy"', "uid = 7", "spin_us = 0", "size = 3"
    )
    [config] = parse(text).devices
    assert config.exposure == Exposure("legacy", 7, 0)
    assert config.attributes == {"size": 3}
    [config] = parse(device('expose = "pci"')).devices
    assert config.exposure == Exposure("modern")
    [config] = parse(device('expose = "bridge"', 'bus = "b"')).devices
    assert config.exposure is None
    assert config.attributes == {}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['expose = "usb"'], r"device\[0\]\.expose: .*'usb'"),
        (['expose = "pci"', 'bus = "b"'], r"device\[0\]: .*leave b out"),
        (['layout = "modern"'], r"device\[0\]: layout, uid and spin_us go with"),
        (["uid = 3"], r"device\[0\]: layout, uid and spin_us go with"),
        (['expose = "pci"', "spin_us = -1"], r"device\[0\]\.spin_us"),
        (['expose = "pci"', "uid = -1"], r"device\[0\]\.uid"),
    ],
)
def test_words_that_do_not_go_together_are_refused(lines: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(device(*lines))


def test_the_layout_is_modern_unless_said() -> None:
    assert exposure("pci", ()) == Exposure("modern", None)
    assert exposure("bridge", ("bus0",)) is None


async def test_a_layout_that_is_not_there_ends_the_start_with_the_place(
    tmp_path: Path,
) -> None:
    text = device('expose = "pci"', 'layout = "best"')
    daemon = Daemon(parse(text), tmp_path / "run", BusModel({"shown": Shown}))
    with pytest.raises(BaseExceptionGroup) as caught:
        await daemon.run()
    error = innermost(caught.value)
    assert isinstance(error, ConfigError)
    assert "device d0: no layout 'best'" in str(error)
