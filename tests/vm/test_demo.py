"""`vbus demo --vm`, run as a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vbus.cli.demo import namespaces
from vbus.vm.image import GuestImage
from vbus.vm.qemu import Qemu

PAIRS = {"vm1-host", "host-vm1", "vm1-vm2", "vm2-vm1", "vm1-p3", "p3-vm1"}
WITHIN_S = 170
SIZE = 64 << 20


@pytest.fixture(autouse=True)
def machines(emulator: Qemu, image: GuestImage) -> None:
    """All is fetched, and namespaces may be made."""
    try:
        namespaces.enter()
    except namespaces.RefusedError as error:
        pytest.skip(str(error))


def start(folder: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "vbus", "demo", "--vm", "--json"],
        env={**os.environ, "TMPDIR": str(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines that name something in the demo's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().replace("\0", " ")
        except OSError:  # gone meanwhile
            continue
        if str(folder) in words:
            found.append(words)
    return found


def test_two_machines_and_a_process_exchange_whole_data_and_outlive_a_kill(
    tmp_path: Path,
) -> None:
    """R15, R61: by VFIO and by uio; then all is gone."""
    interfaces = sorted(os.listdir("/sys/class/net"))
    process = start(tmp_path)
    out, errors = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 0, errors
    result = json.loads(out)
    guests = result["guests"]
    assert {name: one["kind"] for name, one in guests.items()} == {
        **dict.fromkeys(("vm1", "vm2"), "machine"),
        "p3": "process",
    }
    assert "by vfio" in guests["vm1"]["function"]
    assert "by uio" in guests["vm2"]["function"]
    assert result["checksums"].keys() == PAIRS | {"vm1-p3, during the kill"}
    assert {one["bytes"] for one in result["checksums"].values()} == {SIZE}
    assert all(trip > 0 for trip in result["ping_rtt_us"].values())
    assert result["killed"]["held_before"]["mapped_bytes"] > 0
    assert not any(result["killed"]["held_after"].values())
    assert result["reattach_ms"] > 0
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []
    assert sorted(os.listdir("/sys/class/net")) == interfaces


def test_an_interrupt_while_machines_boot_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path)
    end = time.monotonic() + WITHIN_S
    while not any("vfio-user-pci" in words for words in processes_of(tmp_path)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=WITHIN_S)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
    assert processes_of(tmp_path) == []


def test_a_qemu_that_does_not_fit_is_named_in_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, VBUS_QEMU="/bin/true")
    out, errors = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, out) == (1, "")
    assert errors.count("\n") == 1
    assert "VBUS_QEMU=/bin/true is no QEMU with vfio-user-pci" in errors
