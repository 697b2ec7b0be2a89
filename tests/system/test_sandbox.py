"""The daemon inside of its unit's sandbox, as far as there is one without systemd."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import trio

from proxy.guest import attach
from tests.netns import run_isolated
from tests.system.sandbox import Sandbox, groups, sandbox
from tests.system.served import WITHIN_S, Served
from vbus.isolation import policy, seccomp

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"
CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "up0"
class = "switch-tap"
switch = "lan0"
ifname = "vbtest0"
address = "10.99.0.1/24"
[[guest]]
name = "g1"
bus = "bus0"
[[guest]]
name = "g2"
bus = "bus0"
uid = 65534
"""
pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up capabilities"),
    pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here"),
    pytest.mark.skipif(
        policy.this_machine() is None or not seccomp.available(),
        reason="no seccomp filters here",
    ),
]


@pytest.fixture(scope="module")
def known() -> dict[str, list[str]]:
    words = ["systemd-analyze", "syscall-filter"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return groups(done.stdout)


class Boxed(Served):
    """`vbus serve` in a sandbox."""

    def __init__(self, folder: Path, config: str, box: Sandbox) -> None:
        self._box = folder / "sandbox.json"
        self._box.write_bytes(msgspec.json.encode(box))
        super().__init__(folder, config)

    def start(self) -> "subprocess.Popen[bytes]":
        daemon = [sys.executable, "-m", "vbus", "serve", "--config"]
        daemon.append(str(self.log.parent / "vbus.toml"))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.system.sandbox", self._box, *daemon],
                env=self.environment,
                stderr=log,
            )


def test_the_daemon_lives_in_it_with_taps_and_guests(
    tmp_path: Path, known: dict[str, list[str]]
) -> None:
    """Memory is mapped, an interface made and configured, a socket given away."""
    box = sandbox(UNITS / "vbusd.service", known)

    def work() -> None:
        with Boxed(tmp_path, CONFIG, box) as daemon:
            status = Path(f"/proc/{daemon.process.pid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines())
            assert int(fields["CapEff"], 16) == 1 << 12 | 1 << 0
            assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("2", "1")
            assert daemon.socket("g2").stat().st_uid == 65534
            assert "vbtest0" in [name for _, name in socket.if_nameindex()]
            assert daemon.ask("guest", "show")
            assert trio.run(_called, daemon) == b"boxed"
            assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()

    run_isolated(work)


async def _called(daemon: Served) -> bytes:
    with trio.fail_after(WITHIN_S):
        async with attach(daemon.socket("g1"), memory_mib=4) as bridge:
            _, answer = await (await bridge.open("echo0")).call(0, b"boxed")
    return answer


@pytest.mark.parametrize("name", ["vbusd.service", "vbus-backend@.service"])
def test_it_holds_and_a_backend_can_isolate_itself_in_it(
    name: str, known: dict[str, list[str]], tmp_path: Path
) -> None:
    """What the unit denies is denied; Landlock and seccomp stay usable inside."""
    box = tmp_path / "box.json"
    box.write_bytes(msgspec.json.encode(sandbox(UNITS / name, known)))
    program = """
import ctypes, errno, mmap, os, socket
from vbus.isolation import isolate, kernel
def refused(step, *codes):
    try:
        step()
    except OSError as error:
        assert error.errno in codes, error
    else:
        raise AssertionError(step)
P = errno.EPERM
refused(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW), errno.EAFNOSUPPORT)
refused(lambda: os.chroot("/"), P)
refused(lambda: kernel.syscall(165, 0, 0, 0, 0, 0), P)
refused(lambda: kernel.syscall(250, 0, 0, 0, 0, 0), P)
refused(lambda: mmap.mmap(-1, 4096, prot=7), errno.EACCES, P)
socket.socket(socket.AF_UNIX).close()
isolate(required=True)
refused(lambda: socket.socket(socket.AF_UNIX), P)
"""
    words = ["-m", "tests.system.sandbox", str(box), sys.executable, "-c", program]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=WITHIN_S
    )
    assert done.returncode == 0, done.stderr
