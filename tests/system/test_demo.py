"""`vbus demo`, run as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vbus.cli.demo import namespaces, report
from vbus.cli.demo.traffic import checksum

KEYS = {
    "ping_rtt_us",
    "tcp_gbit_s",
    "frames",
    "events",
    "interrupts",
    "frames_per_interrupt",
    "calls",
    "pci",
}


def demo(folder: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "vbus", "demo", "--json", "--seconds", "0.3", *options],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def interfaces() -> list[str]:
    return sorted(os.listdir("/sys/class/net"))


def test_the_demo_measures_all_of_it_and_leaves_nothing(tmp_path: Path) -> None:
    """R15, R60, R61, R8: TAPs, TCP, hot plug, a killed guest; then all is gone."""
    try:
        namespaces.enter()
    except namespaces.RefusedError as error:
        pytest.skip(str(error))
    before = interfaces()
    result = demo(tmp_path)
    assert result.keys() > KEYS
    assert result["ping_rtt_us"].keys() == {"g1-host", "g2-host", "g1-g2"}
    assert all(trip > 0 for trip in result["ping_rtt_us"].values())
    assert set(result["tcp_gbit_s"]) == {"g1-host", "host-g1", "g1-g2", "g2-g1"}
    assert all(rate > 0 for rate in result["tcp_gbit_s"].values())
    assert result["frames"] > result["interrupts"] > 0
    assert result["calls"] > 20
    assert result["hot_plug_ms"]["add_to_running"] > 0
    assert result["reattach_ms"] > 0
    assert interfaces() == before


def test_without_namespaces_generated_frames_move(tmp_path: Path) -> None:
    result = demo(tmp_path, "--frames")
    assert result.keys() > KEYS
    assert result["ping_rtt_us"]["g1-g2"] > 0
    assert result["tcp_gbit_s"] is None
    assert result["generated_gbit_s"] > 0


def test_the_footprint_of_the_bus_does_not_grow_with_its_devices() -> None:
    """R1, R10: beside N functions with their BARs and vectors."""
    ours = {"functions": 1, "bars": 3, "vectors": 8}
    for devices in (1, 100):
        shown = report.footprint(ours, devices)
        assert shown["vbus"] == ours
        assert shown["virtio_pci"] == {
            "functions": devices,
            "bars": 2 * devices,
            "vectors": 3 * devices,
        }


def test_the_ping_checksum_is_the_internets() -> None:
    """The worked example of RFC 1071, section 3."""
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
