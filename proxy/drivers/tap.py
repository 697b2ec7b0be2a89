"""The TAP of a guest's network driver: what it is called, and what it needs."""

import os
from pathlib import Path

from proxy.linux.devices import load_module
from vbus.net.interface import check_name

_NAME_LIMIT = 15
_TUN = Path("/dev/net/tun")


def interface_name(device: str) -> str:
    """Name the interface as its device; if that is too long, let the kernel number."""
    return check_name(device) if len(device) <= _NAME_LIMIT else "venet%d"


def have_tun() -> None:
    """Load the module of TAP interfaces, where this is ours to do and not done."""
    if not _TUN.exists() and os.geteuid() == 0:
        load_module("tun")
