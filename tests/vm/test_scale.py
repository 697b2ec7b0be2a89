"""Many devices behind the one function of a real guest: they come, answer and go."""

import json
import re

import trio

from tests.vm.conftest import Boot, Daemon
from tests.vm.test_function import check_function, devices
from tests.vm.test_guest_run import running, told
from vbus.control.client import ControlClient
from vbus.vm.channel import GuestProcess
from vbus.vm.machine import VirtualMachine

CONFIG = """
[[bus]]
name = "bus0"
[[guest]]
name = "vm1"
bus = "bus0"
"""
HOT, PORTS, MANY = 256, 8, 2000
NAMES = {f"echo{number}" for number in range(HOT)}
# Each driver has two rings of 64 slots of 2 KiB.
MEMORY_MIB = 128
WITHIN_S = 100


async def announced(process: GuestProcess, state: str) -> None:
    """Wait until the guest has told this state of each device, once."""
    missing = set(NAMES)
    async for line in process:
        event = json.loads(line)
        assert event.get("state") != "failed", event
        if event["event"] == "device" and event["state"] == state:
            missing.remove(event["name"])
            if not missing:
                return
    raise AssertionError(f"it ended without {state} of {missing}: {process.stderr!r}")


async def add(control: ControlClient) -> None:
    for name in sorted(NAMES):
        await control.request(
            "device.add", name=name, class_name="echo", buses=["bus0"], attributes={}
        )


async def remove(control: ControlClient) -> None:
    for name in sorted(NAMES):
        await control.request("device.remove", name=name)


def wait_for_functions(vendor: str, count: int) -> None:
    """In the guest: wait until so many functions of a vendor are in sysfs."""
    import time
    from pathlib import Path

    path = Path("/sys/bus/pci/devices")
    while sum(p.read_text().strip() == vendor for p in path.glob("*/vendor")) < count:
        time.sleep(0.01)


def functions(vendor: str) -> int:
    """In the guest: how many functions of a vendor are in sysfs."""
    from pathlib import Path

    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return sum(path.read_text().strip() == vendor for path in vendors)


async def plug_functions(vm: VirtualMachine) -> float:
    """Have QEMU add a PCI function in each root port; seconds until all are seen."""
    before = await vm.python(functions, "0x1af4")
    began = trio.current_time()
    for number in range(PORTS):
        await vm.qmp.execute(
            "device_add", driver="virtio-rng-pci", id=f"r{number}", bus=f"port{number}"
        )
    await vm.python(wait_for_functions, "0x1af4", before + PORTS)
    return trio.current_time() - began


async def test_256_devices_come_and_go_in_a_running_machine(
    daemon: Daemon, boot: Boot
) -> None:
    """R8, R10: all are announced, and PCI sees nothing of it; times are printed."""
    served = daemon(CONFIG)
    async with (
        boot(served.socket("vm1"), root_ports=PORTS) as vm,
        ControlClient(served.runtime / "control.sock") as control,
        running(vm, "--memory-mib", str(MEMORY_MIB)) as process,
    ):
        await told(process, event="attached")
        seen = await vm.python(functions, "0x11da")
        for act, state in ((add, "running"), (remove, "gone")):
            began = trio.current_time()
            with trio.fail_after(WITHIN_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(announced, process, state)
                    await act(control)
                    asked = trio.current_time() - began
            seconds = trio.current_time() - began
            print(
                f"{HOT} devices {state}: {seconds / HOT * 1e3:.2f} ms each, "
                f"of it {asked / HOT * 1e3:.2f} ms in the daemon"
            )
            assert await vm.python(functions, "0x11da") == seen == 1
        seconds = await plug_functions(vm)
        print(f"{PORTS} of virtio-rng-pci seen: {seconds / PORTS * 1e3:.1f} ms each")


async def call_each(count: int) -> list[str]:
    """In the guest: open and call each device once; give those that answer wrong."""
    from proxy.guest import attach

    wrong = []
    async with attach() as bridge:
        for number in range(count):
            device = await bridge.device(f"echo{number}")
            data = f"to echo{number}".encode()
            async with device.opened():
                result, answer = await device.call(0, data)
            if result < 0 or answer != data:
                wrong.append(device.name)
        if len(bridge.devices) != count:
            wrong.append(f"{len(bridge.devices)} devices")
    return wrong


async def test_2000_devices_behind_one_function_answer(
    daemon: Daemon, boot: Boot
) -> None:
    """R1, R8, R10: each is opened and called once, and lspci shows one function."""
    served = daemon(CONFIG + devices(MANY))
    async with boot(served.socket("vm1")) as vm:
        before = unrouted(await check_function(vm))
        began = trio.current_time()
        assert await vm.python(call_each, MANY, timeout_s=WITHIN_S) == []
        seconds = trio.current_time() - began
        print(f"{MANY} devices called: {seconds / MANY * 1e3:.2f} ms each")
        assert unrouted(await check_function(vm)) == before
        assert len(served.ask("device", "show")) == MANY


def unrouted(text: str) -> str:
    """Without the IRQ, which Linux chooses when a driver first enables a function."""
    return re.sub(r"routed to IRQ \d+", "", text)
