"""What `vbus guest qemu-args` prints goes to a real QEMU, word by word (issue 3)."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import trio

from tests.vm.conftest import Boot, Daemon
from tests.vm.test_guest_run import running, told
from vbus.vm import qemu
from vbus.vm.image import GuestImage

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
"""
WITHIN_S = 60


@pytest.mark.parametrize(
    ("iommu", "words"),
    [
        ("intel", ["intel_iommu=on"]),
        ("none", []),
    ],
)
async def test_the_options_make_a_machine_that_attaches(
    daemon: Daemon, boot: Boot, iommu: str, words: list[str]
) -> None:
    """R61: with them any machine is the guest; here the tests' own, without memory."""
    served = daemon(CONFIG)
    printed = served.vbus("guest", "qemu-args", "vm1", "--iommu", iommu).stdout
    extra = shlex.split(printed)
    async with (
        boot(iommu=None, shared=False, words=words, extra=extra) as vm,
        running(vm) as process,
    ):
        await told(process, name="echo0", state="running")
        found = served.ask("guest", "show", "vm1")[0]
        assert found["connections"] == ["echo0"]


async def test_the_whole_command_boots_to_a_shell_that_attaches(
    daemon: Daemon, image: GuestImage, emulator: qemu.Qemu, tmp_path: Path
) -> None:
    """R61: as pasted into a shell; the console is the terminal."""
    served = daemon(CONFIG)
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "vmlinux").symlink_to(image.kernel)
    (folder / "initramfs.cpio").symlink_to(image.initramfs)
    done = await trio.to_thread.run_sync(
        served.vbus, "guest", "qemu-args", "vm1", "--boot", str(folder)
    )
    assert done.returncode == 0, done.stderr
    process = await trio.lowlevel.open_process(
        ["sh", "-c", f"exec {done.stdout}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        said = b""
        with trio.fail_after(WITHIN_S):
            while b"# " not in said:
                said += await process.stdout.receive_some()
            await process.stdin.send_all(b"vbus guest scan --json; poweroff -f\n")
            async for part in process.stdout:
                said += part
            assert await process.wait() == 0
    finally:
        process.kill()
    text = said.decode(errors="replace").replace("\r", "")
    (found,) = json.loads(text[text.index("\n[\n") : text.index("\n]\n") + 2])
    assert list(found["devices"]) == ["echo0"]
