"""`vbus demo --vm`, run as a user does; what it cannot have, and its interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vbus.cli.demo import namespaces
from vbus.vm.image import GuestImage
from vbus.vm.qemu import Qemu

DEMO = [sys.executable, "-m", "vbus", "demo", "--vm"]
PAIRS = {"vm1-host", "host-vm1", "vm1-vm2", "vm2-vm1", "vm1-p3", "p3-vm1"}
UNDER_KILL = "vm1-p3 under the kill"
WITHIN_S = 150


@pytest.fixture(autouse=True)
def _rights() -> None:
    try:
        namespaces.enter()
    except namespaces.RefusedError as error:
        pytest.skip(str(error))


def processes_of(folder: Path) -> list[str]:
    """The commands of all processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if str(folder) in command:
            found.append(command)
    return found


def machines_of(folder: Path) -> list[str]:
    return [one for one in processes_of(folder) if "vfio-user-pci" in one]


def test_machines_and_a_process_share_a_switch_and_outlive_a_killed_one(
    tmp_path: Path, emulator: Qemu, image: GuestImage
) -> None:
    """R15, R50, R60, R61: checked transfers of each pair; all is freed at the end."""
    before = sorted(os.listdir("/sys/class/net"))
    done = subprocess.run(
        [*DEMO, "--json"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["accelerator"] in ("TCG", "KVM")
    guests = result["guests"]
    assert list(guests) == ["vm1", "vm2", "p3"]
    assert "by vfio" in guests["vm1"]["function"]
    assert "by uio" in guests["vm2"]["function"]
    for name in ("vm1", "vm2"):
        assert guests[name]["kind"] == "machine"
        assert 0 < guests[name]["boot_s"] < guests[name]["running_s"]
    assert (guests["p3"]["kind"], guests["p3"]["boot_s"]) == ("process", None)
    assert set(result["ping_rtt_us"]) == {"vm1-host", "vm1-vm2", "vm1-p3", "p3-host"}
    assert set(result["checksums"]) == {*PAIRS, UNDER_KILL}
    assert set(result["tcp_gbit_s"]) == {*PAIRS, UNDER_KILL}
    for sums in result["checksums"].values():
        assert sums["bytes"] >= 64 << 20
        assert re.fullmatch("[0-9a-f]{8}", sums["crc32"])
    killed = result["killed"]
    assert killed["held_before"]["mapped_bytes"] > 512 << 20
    assert killed["held_before"]["connections"] == ["net-vm2"]
    assert not any(killed["held_after"].values())
    assert result["reattach_ms"] > 0
    assert result["frames"] > result["interrupts"] > 0
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []
    assert sorted(os.listdir("/sys/class/net")) == before


def test_an_interrupt_amid_the_boot_ends_all_of_it(
    tmp_path: Path, emulator: Qemu, image: GuestImage
) -> None:
    """R50: no QEMU, no TAP, no folder stays; the status is that of an interrupt."""
    before = sorted(os.listdir("/sys/class/net"))
    process = subprocess.Popen(
        DEMO,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    try:
        end = time.monotonic() + WITHIN_S
        while len(machines_of(tmp_path)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, said
    assert b"Traceback" not in said[1]
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []
    assert sorted(os.listdir("/sys/class/net")) == before


def refused(*prefix: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [*prefix, *DEMO],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    return done.stderr.splitlines()


def test_a_qemu_that_is_none_is_refused_in_one_line() -> None:
    (line,) = refused(VBUS_QEMU="/bin/true")
    assert line == "vbus: VBUS_QEMU=/bin/true is no QEMU with vfio-user-pci (>= 10.1)"


def test_without_a_network_it_says_what_is_missing_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    """What it asks for is told, and then in one line why it is not to be had."""
    told = refused(
        *namespaces.enter(),
        XDG_CACHE_HOME=str(tmp_path),
        VBUS_QEMU="",
    )
    assert told[-1].startswith("vbus: demo --vm: Debian packages cannot be had")
    assert "run this where there is a network" in told[-1]
    assert not any(path.is_dir() for path in (tmp_path / "vbus").iterdir())
