"""What processor this is, for reports: one that was measured is always named."""

import platform
from pathlib import Path


def cpu_name() -> str:
    """Give its name."""
    return cpu_value("model name") or platform.machine()


def cpu_value(key: str) -> str:
    """Give the first value of a key of /proc/cpuinfo, or nothing."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
