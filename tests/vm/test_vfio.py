"""The bridge by VFIO in a real guest: both IOMMUs, both kinds of interrupt (R50)."""

import json
import re
import signal

import pytest
import trio

from tests.vm.conftest import Boot, Daemon
from tests.vm.test_guest_run import (
    WITHIN_S,
    hide_module,
    refused,
    running,
    told,
)
from vbus.vm import arguments
from vbus.vm.arguments import Iommu
from vbus.vm.machine import VirtualMachine

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "vm1"
bus = "bus0"
[[guest]]
name = "plain"
bus = "bus0"
msix = false
"""
CALLS, MESSAGES = 200, 200
FREE_PAGES = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
UNSAFE = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"


async def exercise(
    address: str | None, compat: bool, calls: int, messages: int
) -> dict[str, object]:
    """In the guest: attach, call the echo device, use its rings; tell how it went."""
    import time

    import trio

    from proxy.drivers.echo import EchoDriver
    from proxy.guest import attach
    from proxy.tasks import beside

    ways: list[str] = []
    async with attach(address, memory_mib=7, compat=compat, say=ways.append) as bridge:
        function = bridge.function
        driver = EchoDriver(await bridge.device(0), {})
        ready = trio.Event()
        async with beside(lambda: driver.run(lambda _: ready.set())):
            await ready.wait()
            trips, answers = [], []
            for number in range(messages):
                data = number.to_bytes(4, "little") * 100
                began = time.perf_counter_ns()
                answers.append(await driver.exchange(data) == data)
                trips.append(time.perf_counter_ns() - began)
            times = []
            for number in range(calls):
                data = number.to_bytes(4, "little") * 16
                began = time.perf_counter_ns()
                answers.append((await driver.device.call(0, data))[1] == data)
                times.append(time.perf_counter_ns() - began)
        command = await function.config_read(4, 2)
        statistics = bridge.statistics()
        return {
            "way": ways[0],
            "answers": all(answers),
            "call_us": sorted(times)[calls // 2] / 1000,
            "trip_us": sorted(trips)[messages // 2] / 1000,
            "queues": statistics.queues,
            "vectors": list(statistics.interrupts.by_vector),
            "events": statistics.events,
            "memory": [function.memory.base, function.memory.size],
            "bus_master": bool(command[0] & 4),
        }


def as_nobody(*words: str) -> list[str]:
    """`vbus guest run` without rights."""
    code = (
        "import os, sys; os.setgid(65534); os.setuid(65534);"
        "os.execvp('vbus', ['vbus', 'guest', 'run', *sys.argv[1:]])"
    )
    return ["python3", "-c", code, *words]


def state(address: str) -> dict[str, object]:
    """In the guest: what sysfs says about a function."""
    import os
    from pathlib import Path

    path = Path("/sys/bus/pci/devices") / address
    driver = path / "driver"
    return {
        "driver": os.path.basename(os.readlink(driver)) if driver.exists() else None,
        "override": (path / "driver_override").read_text().strip(),
        "bus_master": bool((path / "config").read_bytes()[4] & 4),
    }


NOBODYS = {"driver": None, "override": "(null)", "bus_master": False}


async def bridge_address(vm: VirtualMachine) -> str:
    lines = (await vm.run("lspci", "-D", "-d", "11da:")).stdout.splitlines()
    assert len(lines) == 1, lines
    return lines[0].split()[0]


async def free_pages(vm: VirtualMachine) -> tuple[int, int]:
    """Huge pages that are free, and all."""
    total = await vm.get(FREE_PAGES.replace("free_", "nr_"))
    return int(await vm.get(FREE_PAGES)), int(total)


@pytest.mark.parametrize("iommu", ["intel", "virtio"])
@pytest.mark.parametrize("guest", ["vm1", "plain"])
async def test_events_calls_and_rings_work(
    daemon: Daemon, boot: Boot, iommu: Iommu, guest: str
) -> None:
    """R5, R50: by MSI-X each queue has its vector, by MSI there is one for all."""
    served = daemon(CONFIG)
    async with boot(served.socket(guest), iommu=iommu) as vm:
        address = await bridge_address(vm)
        for compat in (False, True):
            done = await vm.python(exercise, address, compat, CALLS, MESSAGES)
            print(guest, iommu, done)
            assert re.search(r"by vfio \(IOMMU group \d+\)$", done["way"])
            assert done["answers"]
            assert done["bus_master"]
            assert done["memory"] == [4 << 30, 8 << 20]
            assert done["queues"] == (1 if compat else 8)
            several = guest == "vm1" and not compat
            assert len(done["vectors"]) == (8 if several else 1)
            assert done["events"]["devadd"] == 1
            # Nobody polls: each event was told by an interrupt.
            assert sum(done["vectors"]) > 0
            assert await vm.python(state, address) == NOBODYS
            (shown,) = served.ask("guest", "show", guest)
            assert shown["connections"] == []
            free, total = await free_pages(vm)
            assert free == total


async def test_a_killed_process_leaves_the_function_usable(
    daemon: Daemon, boot: Boot
) -> None:
    """R50: the kernel ends bus mastering and unmaps, the host closes what was open."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1")) as vm:
        address = await bridge_address(vm)
        process = await vm.start("vbus", "guest", "run", "--json")
        await told(process, name="echo0", state="running")
        assert "in use by another process" in await refused(vm)
        found = json.loads((await vm.run("vbus", "guest", "scan", "--json")).stdout)
        assert found[0]["state"].startswith("busy: ")
        process.signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        assert served.ask("guest", "show", "vm1")[0]["connections"] == []
        left = await vm.python(state, address)
        assert left == {"driver": "vfio-pci", "override": "vfio-pci"} | {
            "bus_master": False
        }
        free, total = await free_pages(vm)
        assert free == total
        async with running(vm) as process:
            await told(process, name="echo0", state="running")
        # It was bound to vfio-pci when this one came, so it stays so.
        assert (await vm.python(state, address))["driver"] == "vfio-pci"


async def test_the_kernel_gets_the_function_back_when_it_asks(
    daemon: Daemon, boot: Boot
) -> None:
    """R61: who unbinds or unplugs it would wait for us without end."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1")) as vm:
        address = await bridge_address(vm)
        process = await vm.start("vbus", "guest", "run", "--json")
        await told(process, name="echo0", state="running")
        unbind = f"echo {address} >/sys/bus/pci/drivers/vfio-pci/unbind"
        await vm.run("sh", "-c", unbind, timeout_s=WITHIN_S)
        assert await process.wait() == 1
        assert f"the kernel takes {address} away" in process.stderr.decode()
        assert served.ask("guest", "show", "vm1")[0]["connections"] == []


async def test_when_the_host_dies_the_guest_ends_with_one_line(
    daemon: Daemon, boot: Boot
) -> None:
    """R61: reads give all ones then; the machine lives on."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1")) as vm:
        process = await vm.start("vbus", "guest", "run", "--json")
        await told(process, name="echo0", state="running")
        served.process.kill()
        with trio.fail_after(WITHIN_S):
            assert await process.wait() == 1
        assert "does not answer any more" in process.stderr.decode()


async def test_what_is_missing_is_told_with_the_command_that_helps(
    daemon: Daemon, boot: Boot
) -> None:
    """R61: one line each, and the function is as it was."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1"), iommu="virtio") as vm:
        hidden = await vm.python(hide_module, "vfio-pci")
        assert "modprobe vfio-pci failed: " in await refused(vm)
        await vm.run("mv", f"{hidden}.hidden", hidden)
        done = await vm.run(*as_nobody(), check=False)
        assert (done.status, done.stderr.count("\n")) == (1, 1)
        assert "as root" in done.stderr
        lack = await refused(vm, "--memory-mib", "4096")
        assert re.search(r"2048 huge pages .* run: sysctl vm.nr_hugepages=2048$", lack)
        await vm.run("sh", "-c", f"echo N >{UNSAFE}")
        assert f"run: echo Y >{UNSAFE}" in await refused(vm)
        address = await bridge_address(vm)
        assert await vm.python(state, address) == NOBODYS
        await vm.run("sh", "-c", f"echo Y >{UNSAFE}")
        async with running(vm) as process:
            await told(process, name="echo0", state="running")


async def test_a_user_who_is_given_the_group_needs_no_root(
    daemon: Daemon, boot: Boot
) -> None:
    """R50: binding, pages and limits are prepared by root."""
    served = daemon(CONFIG)
    async with boot(served.socket("vm1"), words=["guest.hugepages=4"]) as vm:
        address = await bridge_address(vm)
        await vm.python(bind, address)
        nobody = as_nobody("--memory-mib", "8", "--json")
        done = await vm.run(*nobody, check=False)
        assert re.search(r"/dev/vfio/\d+ may not be opened: .*chown", done.stderr)
        await vm.run("sh", "-c", "chown 65534 /dev/vfio/*")
        process = await vm.start("sh", "-c", 'ulimit -l 1024; exec "$@"', "-", *nobody)
        assert await process.wait() == 1
        assert b"8 MiB of memory; run: ulimit -l 8192" in process.stderr
        nobody = ["sh", "-c", 'ulimit -l 8192; exec "$@"', "-", *nobody]
        process = await vm.start(*nobody)
        await told(process, name="echo0", state="running")
        process.signal(signal.SIGTERM)
        assert await process.wait() == 0


def bind(address: str) -> None:
    """In the guest: have vfio-pci take a function, as an administrator does."""
    import subprocess
    from pathlib import Path

    subprocess.run(["modprobe", "-a", "vfio-pci", "vfio_iommu_type1"], check=True)
    path = Path("/sys/bus/pci/devices") / address
    (path / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(address)


async def test_a_neighbour_in_the_group_is_named(daemon: Daemon, boot: Boot) -> None:
    """R50: behind an old PCI bus the IOMMU cannot tell functions apart."""
    served = daemon(CONFIG)
    bridge = json.loads(arguments.bridge_device(served.socket("vm1"))[1])
    extra = [
        *("-device", "pcie-pci-bridge,id=old"),
        *("-device", "virtio-rng-pci,bus=old,addr=1"),
        *("-device", json.dumps(bridge | {"bus": "old", "addr": "2"})),
    ]
    async with boot(extra=extra) as vm:
        said = await refused(vm)
        print(said)
        (command,) = re.findall(r"has .* \(virtio-pci\) as well; run: (.*)$", said)
        await vm.run("sh", "-c", command)
        async with running(vm) as process:
            await told(process, name="echo0", state="running")
