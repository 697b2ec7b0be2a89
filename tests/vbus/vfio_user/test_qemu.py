"""A stock QEMU (10.1 or newer) with our function in it: firmware only, no guest system.

What `vbus.vm.qemu` finds is used; tests with a guest system are in tests/vm.
"""

import json
import os
import subprocess

import pytest
import trio

from vbus.errors import NotFoundError, VbusError
from vbus.pci.constants import Command, Offset, Region
from vbus.vm import qemu

pytestmark = [pytest.mark.slow, pytest.mark.vm]


@pytest.fixture(scope="session")
def emulator():
    """A fit QEMU; without one: skip, or fail where VBUS_VM_REQUIRED is set."""
    try:
        found = qemu.find()
        if found is None:
            raise NotFoundError("no QEMU with vfio-user-pci: run `vbus guest qemu`")
    except VbusError as error:
        if os.environ.get("VBUS_VM_REQUIRED"):
            raise
        pytest.skip(str(error))
    return str(found.path)


class Machine:
    """A running QEMU and its monitor (QMP on its standard input and output)."""

    def __init__(self, process):
        self.process = process
        self.lines = b""

    async def command(self, line):
        """Run a command of the human monitor and give what it printed."""
        request = {
            "execute": "human-monitor-command",
            "arguments": {"command-line": line},
        }
        await self.execute(request)
        return (await self.answer())["return"]

    async def execute(self, request):
        await self.process.stdin.send_all(json.dumps(request).encode() + b"\n")

    async def answer(self):
        while True:
            while b"\n" not in self.lines:
                self.lines += await self.process.stdout.receive_some()
            line, self.lines = self.lines.split(b"\n", 1)
            message = json.loads(line)
            if "return" in message or "error" in message:
                return message


@pytest.fixture
async def machine(bench, emulator):
    memory = "memory-backend-memfd,id=mem,size=64M,share=on"
    socket = {"type": "unix", "path": str(bench.path)}
    device = json.dumps({"driver": "vfio-user-pci", "socket": socket})
    arguments = f"-accel tcg -m 64M -M q35,memory-backend=mem -object {memory}"
    arguments += " -nodefaults -display none -qmp stdio"
    process = await trio.lowlevel.open_process(
        [emulator, *arguments.split(), "-device", device],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    machine = Machine(process)
    with trio.fail_after(60):
        await machine.execute({"execute": "qmp_capabilities"})
        await machine.answer()
        # The firmware switches decoding on when all addresses are given out.
        while not bench.function.config.command & Command.MEMORY:
            await machine.command("info status")
    yield machine
    process.kill()
    await process.wait()
    await process.stdin.aclose()
    await process.stdout.aclose()


async def write_config(machine, offset, value):
    """Through the ports 0xcf8 and 0xcfc, for bus 0, device 1, function 0."""
    await machine.command(f"o /w 0xcf8 {0x80000800 | offset:#x}")
    await machine.command(f"o /w 0xcfc {value:#x}")


async def test_firmware_finds_the_function_and_gives_it_its_addresses(bench, machine):
    """R1, R61: one function, two BARs and the vector table's."""
    text = await machine.command("info pci")
    assert "Bridge: PCI device 11da:2000" in text
    config = bench.function.config
    for bar, kind in ((0, "32 bit memory"), (1, "I/O"), (2, "32 bit memory")):
        assert f"BAR{bar}: {kind} at {config.bar_address(bar):#x}" in text.replace(
            "at 0x0000", "at 0x"
        )
    counters = bench.server.statistics()
    assert counters.errors == counters.protocol_errors == 0
    assert counters.region_reads[Region.CONFIG] > 10


async def test_registers_memory_and_dma_messages_work(bench, machine):
    """R50, R61: what the machine has in memory is what we see, both ways."""
    function, server = bench.function, bench.server
    await write_config(machine, Offset.COMMAND, 0x7)
    assert function.bus_master
    await machine.command(f"o /w {function.config.bar_address(1) + 8:#x} 0x55")
    assert function.seen("write")[-1] == (1, 8, b"\x55\0\0\0")
    text = await machine.command(f"xp /1xw {function.config.bar_address(0) + 4:#x}")
    assert "0x07060504" in text

    function.memory.write(0x200000, b"south")
    assert "0x74756f73" in await machine.command("xp /1xw 0x200000")

    assert await server.dma_read(0xF0000, 4096) == function.memory.read(0xF0000, 4096)
    data = os.urandom(1 << 20)
    await server.dma_write(0x300000, data)
    assert function.memory.read(0x300000, len(data)) == data
    assert await server.dma_read(0x300000, len(data)) == data


async def test_reset_of_the_machine_resets_the_function(bench, machine):
    before = bench.server.statistics().resets
    await write_config(machine, Offset.COMMAND, 0x7)
    await machine.command("system_reset")
    with trio.fail_after(30):
        while bench.server.statistics().resets == before or bench.function.bus_master:
            await machine.command("info status")
    assert bench.server.statistics().errors == 0
    assert not bench.function.interrupt(0)


async def test_intx_is_set_up_from_the_start(bench, machine):
    await write_config(machine, Offset.COMMAND, 0x7)
    assert bench.function.interrupt()
    assert bench.server.statistics().interrupts == 1
