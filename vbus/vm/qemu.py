"""A QEMU that can attach to a vfio-user socket: finding one, fetching one.

The device `vfio-user-pci` came with QEMU 10.1. What runs it is `machine.py`.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vbus.errors import InvalidError
from vbus.vm import cache
from vbus.vm.cache import Say, silent
from vbus.vm.debian import LIBRARIES, LOADER, Apt, UnavailableError, unpack

DEVICE = "vfio-user-pci"
_FOLDER = "qemu-trixie-backports"
_SUITES = ("trixie", "trixie-backports")
_PROBE_TIMEOUT_S = 30

# Started by its own loader with its own libraries; told its firmware and modules.
_WRAPPER = f"""\
#!/bin/sh
r=$(dirname "$(readlink -f "$0")")
QEMU_MODULE_DIR=$r/{LIBRARIES}/qemu
export QEMU_MODULE_DIR
exec "$r/{LOADER}" --argv0 qemu-system-x86_64 --library-path "$r/{LIBRARIES}" \\
    "$r/usr/bin/qemu-system-x86_64" \\
    -L "$r/usr/share/qemu" -L "$r/usr/share/seabios" -L "$r/usr/lib/ipxe/qemu" "$@"
"""
_UNREAD = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info")


@dataclass(frozen=True)
class Qemu:
    """A QEMU for x86-64 that has the vfio-user client. `path` starts it as it is."""

    path: Path
    version: str


def find() -> Qemu | None:
    """Give $VBUS_QEMU, else the one fetched earlier, else the one of PATH, if fit.

    Raises InvalidError if $VBUS_QEMU is set and is not fit.
    """
    chosen = os.environ.get("VBUS_QEMU")
    if chosen:
        qemu = _fit(Path(chosen))
        if qemu is None:
            raise InvalidError(f"VBUS_QEMU={chosen} is no QEMU with {DEVICE} (>= 10.1)")
        return qemu
    on_path = shutil.which("qemu-system-x86_64")
    places = [cache.root() / _FOLDER / "qemu", *([Path(on_path)] if on_path else [])]
    return next(filter(None, map(_fit, places)), None)


def fetch(say: Say = silent) -> Qemu:
    """Give a fit QEMU; take Debian's into the cache if there is none.

    About 40 MB come over the network. Raises UnavailableError, InvalidError, OSError.
    """
    qemu = find()
    if qemu is None:
        place = cache.folder(_FOLDER, lambda fresh: _make(fresh, say), say) / "qemu"
        qemu = _fit(place)
    if qemu is None:
        raise UnavailableError(f"the QEMU in {place.parent} does not run: delete it")
    return qemu


def _make(fresh: Path, say: Say) -> None:
    apt = Apt(fresh / "apt", _SUITES, say)
    say("fetching QEMU")
    debs = apt.download("qemu-system-x86")
    say(f"unpacking {len(debs)} packages")
    unpack(debs, fresh)
    shutil.rmtree(fresh / "apt")
    for name in _UNREAD:
        shutil.rmtree(fresh / name, ignore_errors=True)
    (fresh / "qemu").write_text(_WRAPPER)
    (fresh / "qemu").chmod(0o755)
    if _fit(fresh / "qemu") is None:
        raise UnavailableError(f"Debian's QEMU does not run here or has no {DEVICE}")


def _fit(path: Path) -> Qemu | None:
    """Ask a QEMU what it is; None if it does not run or has no vfio-user client."""
    version = re.search(r"version (\S+)", _output(path, "--version"))
    if version is None or f'"{DEVICE}"' not in _output(path, "-device", "help"):
        return None
    return Qemu(path.absolute(), version[1])


def _output(path: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            [path, *words],
            check=False,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
