"""Configuration space: what a guest reads, and the little it can change (R53)."""

import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbus.errors import InvalidError
from vbus.pci.config_space import Bar, ConfigSpace, Identity, Msi, Msix, Vendor
from vbus.pci.constants import Command, Offset

BRIDGE = Identity(0x11DA, 0x2000, 0x068000, 2, 0x1AF4, 0x1100)


def bridge_space(msix=True):
    """The function of ABI section 1, with or without the MSI-X extension."""
    bars = {0: Bar(64), 1: Bar(32, io=True)}
    capabilities = [Msi()]
    if msix:
        bars[2] = Bar(4096)
        capabilities.append(Msix(8, 2, 0x800))
    return ConfigSpace(BRIDGE, bars, capabilities, interrupt_pin=1)


def number(space, offset, size):
    return int.from_bytes(space.read(offset, size), "little")


def put(space, offset, size, value):
    space.write(offset, value.to_bytes(size, "little"))


def test_bridge_as_the_abi_page_has_it():
    """R1: ABI section 1, register by register."""
    space = bridge_space(msix=False)
    assert space.read(0, 256) == bytes.fromhex(
        "da110020 00001000 02008006 00000000"
        "00000000 01000000 00000000 00000000"
        "00000000 00000000 00000000 f41a0011"
        "00000000 40000000 00000000 00010000"
        "05000000 00000000 00000000 00000000"
    ) + bytes(256 - 80)


def test_msix_follows_msi():
    space = bridge_space()
    assert number(space, 0x41, 1) == 0x50
    assert space.read(0x50, 12) == struct.pack("<BBHII", 0x11, 0, 7, 2, 0x802)


def test_bars_are_sized_by_writing_ones():
    space = bridge_space()
    sizes = []
    for bar in range(6):
        put(space, Offset.BAR0 + 4 * bar, 4, 0xFFFFFFFF)
        sizes.append(number(space, Offset.BAR0 + 4 * bar, 4))
    assert sizes == [0xFFFFFFC0, 0xFFFFFFE1, 0xFFFFF000, 0, 0, 0]
    put(space, Offset.BAR0, 4, 0xFEBD1234)
    put(space, Offset.BAR0 + 4, 4, 0xC050)
    assert number(space, Offset.BAR0, 4) == 0xFEBD1200
    assert number(space, Offset.BAR0 + 4, 4) == 0xC041
    assert (space.bar_address(0), space.bar_address(1)) == (0xFEBD1200, 0xC040)
    put(space, Offset.ROM_BAR, 4, 0xFFFFFFFF)
    assert number(space, Offset.ROM_BAR, 4) == 0


def test_command_register_keeps_what_it_may():
    space = bridge_space()
    put(space, Offset.COMMAND, 2, 0xFFFF)
    assert space.command == sum(Command) == 0x547
    assert space.bus_master
    put(space, Offset.COMMAND, 2, 0x0003)
    assert not space.bus_master


def test_msi_control_keeps_only_the_enable_bit():
    """ABI section 1: one vector, 32-bit address, no mask bits."""
    space = bridge_space()
    put(space, 0x42, 2, 0xFFFF)
    put(space, 0x44, 4, 0xFEE00003)
    put(space, 0x48, 2, 0xFFFF)
    assert space.read(0x40, 10) == struct.pack("<BBHIH", 5, 0x50, 1, 0xFEE00000, 0xFFFF)


def test_msix_control_keeps_enable_and_mask():
    space = bridge_space()
    put(space, 0x52, 2, 0xFFFF)
    put(space, 0x54, 4, 0xFFFFFFFF)
    put(space, 0x58, 4, 0xFFFFFFFF)
    assert space.read(0x50, 12) == struct.pack("<BBHII", 0x11, 0, 0xC007, 2, 0x802)


# What the standard lets a guest write, by byte; everything else is fixed.
WRITABLE = {
    **dict.fromkeys(range(0x04, 0x06), True),
    **dict.fromkeys((0x0C, 0x0D, 0x3C), True),
    **dict.fromkeys(range(0x10, 0x1C), True),
    **dict.fromkeys(range(0x42, 0x4A), True),
    **dict.fromkeys((0x53,), True),
}

writes = st.lists(
    st.tuples(st.integers(0, 255), st.binary(min_size=1, max_size=64)), max_size=30
)


@given(writes)
def test_no_write_moves_a_read_only_field(sequence):
    """R53: ids, class, sizes, capability list and everything unused stay."""
    space = bridge_space()
    before = space.read(0, 256)
    for offset, data in sequence:
        if offset + len(data) <= 256:
            space.write(offset, data)
        else:
            with pytest.raises(InvalidError):
                space.write(offset, data)
    after = space.read(0, 256)
    for at in range(256):
        if at not in WRITABLE:
            assert after[at] == before[at], hex(at)
    for bar, size in enumerate((64, 32, 4096)):
        assert space.bar_address(bar) % size == 0
    space.reset()
    assert space.read(0, 256) == before


@given(writes)
def test_reading_back_gives_the_writable_bits_of_the_last_write(sequence):
    """A bit either follows every write or none."""
    space = bridge_space()
    put_all = bridge_space()
    put_all.write(0, b"\xff" * 256)
    mask = bytes(
        a ^ b for a, b in zip(put_all.read(0, 256), space.read(0, 256), strict=True)
    )
    model = bytearray(space.read(0, 256))
    for offset, data in sequence:
        data = data[: 256 - offset]
        space.write(offset, data)
        for at, value in enumerate(data, offset):
            model[at] = (model[at] & ~mask[at]) | (value & mask[at])
    assert space.read(0, 256) == bytes(model)


@pytest.mark.parametrize(("offset", "size"), [(-1, 2), (255, 2), (256, 1), (0, 257)])
def test_nothing_beyond_the_256_bytes_is_reached(offset, size):
    space = bridge_space()
    with pytest.raises(InvalidError):
        space.read(offset, size)
    with pytest.raises(InvalidError):
        space.write(offset, bytes(size))


def test_vendor_capabilities_are_read_only_and_chained():
    space = ConfigSpace(BRIDGE, {}, [Vendor(b"abc"), Vendor(b""), Msi()])
    assert number(space, Offset.CAPABILITIES, 1) == 0x40
    space.write(0x40, bytes(0x30))
    assert space.read(0x40, 6) == b"\x09\x50\x06abc"
    assert space.read(0x50, 3) == b"\x09\x60\x03"
    assert space.read(0x60, 2) == b"\x05\x00"


def test_a_vendor_capability_may_have_bits_that_the_guest_changes():
    """R53: those bits and no others."""
    head, data = Vendor(b"ab"), Vendor(b"\x00\xf0\x00", writable=b"\x00\x0f")
    space = ConfigSpace(BRIDGE, {}, [head, data])
    at = space.offset_of(data)
    assert at == 0x50
    space.write(at, b"\xff" * 16)
    assert space.read(at, 7) == b"\x09\x00\x06\x00\xff\x00\x00"
    with pytest.raises(InvalidError):
        space.offset_of(Vendor(b"ab"))


def test_msix_is_enabled_by_its_own_bit():
    space = bridge_space()
    assert not space.msix_enabled
    put(space, 0x52, 2, 1 << 15)
    assert space.msix_enabled
    space.reset()
    assert not space.msix_enabled
    assert not bridge_space(msix=False).msix_enabled


def test_function_without_capabilities_says_so():
    space = ConfigSpace(BRIDGE, {0: Bar(16)})
    assert number(space, Offset.STATUS, 2) == 0
    assert number(space, Offset.CAPABILITIES, 1) == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: Bar(48),
        lambda: Bar(8),
        lambda: Bar(2, io=True),
        lambda: Bar(1 << 32),
        lambda: Msix(0, 0, 0x800),
        lambda: Msix(2049, 0, 1 << 20),
        lambda: Msix(8, 0, 0x40),
        lambda: Msix(8, 0, 0x804),
        lambda: ConfigSpace(BRIDGE, {6: Bar(16)}),
        lambda: ConfigSpace(BRIDGE, {}, [Msix(8, 2, 0x800)]),
        lambda: ConfigSpace(BRIDGE, {2: Bar(2048)}, [Msix(8, 2, 0x800)]),
        lambda: ConfigSpace(BRIDGE, {2: Bar(4096, io=True)}, [Msix(8, 2, 0x800)]),
        lambda: ConfigSpace(BRIDGE, {}, [Vendor(bytes(200))]),
    ],
)
def test_impossible_functions_cannot_be_built(build):
    with pytest.raises(InvalidError):
        build()


@pytest.mark.skipif(shutil.which("lspci") is None, reason="needs lspci")
def test_lspci_reads_the_same_out_of_it(tmp_path):
    """R1: a dump of ours, read by the tool everybody uses."""
    space = bridge_space()
    put(space, Offset.COMMAND, 2, Command.IO | Command.MEMORY | Command.BUS_MASTER)
    put(space, Offset.BAR0, 4, 0xFEBD1000)
    put(space, Offset.BAR0 + 4, 4, 0xC040)
    put(space, Offset.BAR0 + 8, 4, 0xFEBD2000)
    dump = ["00:01.0 Bridge"]
    for at in range(0, 256, 16):
        dump.append(f"{at:02x}: " + space.read(at, 16).hex(" "))
    path = tmp_path / "dump"
    path.write_text("\n".join(dump) + "\n")
    text = subprocess.run(
        ["lspci", "-F", str(path), "-nnvv"], capture_output=True, text=True, check=True
    ).stdout
    for expected in (
        "[0680]: ",
        "[11da:2000] (rev 02)",
        "I/O+ Mem+ BusMaster+",
        "Interrupt: pin A",
        "Region 0: Memory at febd1000 (32-bit, non-prefetchable)",
        "Region 1: I/O ports at c040",
        "Region 2: Memory at febd2000 (32-bit, non-prefetchable)",
        "Capabilities: [40] MSI: Enable- Count=1/1 Maskable- 64bit-",
        "Capabilities: [50] MSI-X: Enable- Count=8 Masked-",
        "Vector table: BAR=2 offset=00000000",
        "PBA: BAR=2 offset=00000800",
    ):
        assert expected in text, text
