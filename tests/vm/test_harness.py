"""The harness itself, in a real machine: what it runs, and how it fails."""

import os
import signal
from pathlib import Path

import pytest
import trio

from tests.vm.conftest import Boot
from vbus.errors import InvalidError
from vbus.vm.errors import (
    GuestCommandError,
    GuestError,
    GuestGoneError,
    GuestPythonError,
    GuestTimeoutError,
)
from vbus.vm.machine import VirtualMachine

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def add(first: int, second: int) -> dict[str, int]:
    import os

    return {"sum": first + second, "uid": os.getuid()}


async def wait_a_little() -> str:
    import trio

    await trio.sleep(0.01)
    return "waited"


def divide_by_zero() -> float:
    return 1 / 0


def hang() -> None:
    import time

    time.sleep(1000)


async def test_programs_python_and_files(boot: Boot) -> None:
    """R61: everything the harness does, in one boot."""
    async with boot() as vm:
        print(f"agent up after {vm.boot_seconds:.1f} s")
        await check_programs(vm)
        await check_python(vm)
        await check_background(vm)
        data = os.urandom(700_001)
        await vm.put("/tmp/data", data)
        assert await vm.get("/tmp/data") == data
        assert "guest" in (await vm.run("vbus", "--help")).stdout


async def check_programs(vm: VirtualMachine) -> None:
    done = await vm.run("sh", "-c", "echo out; echo err >&2; echo $V", env={"V": "v"})
    assert (done.stdout, done.stderr, done.status) == ("out\nv\n", "err\n", 0)
    with pytest.raises(GuestCommandError, match=r"ended with 3: sorry"):
        await vm.run("sh", "-c", "echo sorry >&2; exit 3")
    assert (await vm.run("false", check=False)).status == 1
    with pytest.raises(GuestError, match=r"no-such-program"):
        await vm.run("no-such-program")
    with pytest.raises(GuestTimeoutError, match=r"sleep in 0\.2 s.*console"):
        await vm.run("sleep", "77", timeout_s=0.2)
    left = await vm.run("sh", "-c", "sleep 0.2; ps | grep -c '[s]leep 77'", check=False)
    assert left.stdout == "0\n"


async def check_python(vm: VirtualMachine) -> None:
    assert await vm.python(add, 2, 3) == {"sum": 5, "uid": 0}
    assert await vm.python(wait_a_little) == "waited"
    assert await vm.python("def main(*a):\n    return list(a)\n", "x", None) == [
        "x",
        None,
    ]
    with pytest.raises(
        GuestPythonError, match=r"ZeroDivisionError.*\n(?s:.*)return 1 / 0"
    ):
        await vm.python(divide_by_zero)
    with pytest.raises(GuestTimeoutError, match=r"hang in 0\.2 s"):
        await vm.python(hang, timeout_s=0.2)

    def uses_vm() -> int:
        return vm.pid

    with pytest.raises(InvalidError, match=r"uses vm from outside"):
        await vm.python(uses_vm)


async def check_background(vm: VirtualMachine) -> None:
    loop = (
        "trap 'echo bye; exit 7' TERM; echo one; echo two; while :; do sleep 0.1; done"
    )
    process = await vm.start("sh", "-c", loop)
    lines = aiter(process)
    assert [await anext(lines), await anext(lines)] == ["one", "two"]
    process.signal(signal.SIGTERM)
    assert [line async for line in lines] == ["bye"]
    assert await process.wait() == 7
    killed = await vm.start("sleep", "1000")
    killed.signal(signal.SIGKILL)
    assert await killed.wait() == -signal.SIGKILL


async def test_a_reset_fails_what_runs_and_the_agent_comes_again(boot: Boot) -> None:
    async with boot() as vm:
        running = await vm.start("sleep", "1000")
        await vm.reboot()
        with pytest.raises(GuestGoneError, match=r"was reset"):
            await running.wait()
        assert await vm.python(add, 1, 1) == {"sum": 2, "uid": 0}
        await vm.start("reboot", "-f")  # the guest's own way
        await vm.wait_up()
        assert await vm.python(add, 1, 2) == {"sum": 3, "uid": 0}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["poweroff", "-f"], r"QEMU ended with status 0 \(guest-shutdown\)"),
        (
            ["sh", "-c", "sleep 0.2; echo c >/proc/sysrq-trigger"],
            r"panicked; the console \(.*sysrq",
        ),
    ],
)
async def test_a_guest_that_leaves_ends_what_waits_for_it(
    boot: Boot, words: list[str], why: str
) -> None:
    async with boot() as vm:
        with trio.fail_after(30):
            with pytest.raises(GuestGoneError, match=f"(?s){why}"):
                await vm.run(
                    "sh", "-c", f"{' '.join(words[:-1])} '{words[-1]}'; sleep 99"
                )
            with pytest.raises(GuestGoneError):
                await vm.run("true")


async def test_no_process_and_no_socket_is_left(boot: Boot, tmp_path: Path) -> None:
    """R61: neither after a cancellation nor after an error in the block."""
    with trio.move_on_after(60) as scope:
        async with boot() as vm:
            assert exists(vm.pid)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not exists(vm.pid)
    assert not sockets(tmp_path)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def sockets(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


async def test_a_qemu_that_does_not_start_says_why(boot: Boot) -> None:
    with pytest.raises(GuestGoneError, match=r"status 1.*no-such-device"):
        async with boot(extra=["-device", "no-such-device"]):
            pass
