"""`vbus guest run|scan` on a machine without a bridge: what is said, and how it ends.

With a bridge: tests/proxy/test_processes.py (socket), tests/vm/test_guest_run.py.
"""

import json
import subprocess
import sys

import pytest

from proxy.linux.function import bridges

pytestmark = pytest.mark.skipif(bool(bridges()), reason="this machine has a bridge")


def vbus(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vbus", "guest", *words],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_run_says_that_there_is_no_bridge_and_what_a_host_process_does() -> None:
    done = vbus("run")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "no bridge (11da:2000)" in done.stderr
    assert "vbus guest run SOCKET" in done.stderr


def test_run_says_that_there_is_none_at_an_address() -> None:
    done = vbus("run", "--device", "00:04.0")
    assert done.returncode == 1
    assert done.stderr == "vbus: there is no bridge (11da:2000) at 0000:00:04.0\n"


@pytest.mark.parametrize(
    "words",
    [
        ("--device", "/run/g1.sock"),
        ("g1.sock", "--device", "00:04.0"),
        ("g1.sock", "--set", "nbd=/run/disk0"),
        ("g1.sock", "--set", "disk0.nbd"),
    ],
)
def test_wrong_use_is_told(words: tuple[str, ...]) -> None:
    done = vbus("run", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_scan_finds_nothing() -> None:
    done = vbus("scan")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "this machine has no bridge\n"
    assert json.loads(vbus("scan", "--json").stdout) == []
