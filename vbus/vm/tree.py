"""The working tree as the guest gets it: the packages of vbus, compiled cores included.

Taken from where this Python finds them, so an editable install gives the tree as it
stands. Laid out as an installation: entry points work in the guest.
"""

import hashlib
import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

from vbus.vm.base import SITE
from vbus.vm.debian import UnavailableError

GUEST = Path(__file__).parent / "guest"
AGENT = "usr/lib/vbus-guest/agent.py"
_UNUSED = {".c", ".h", ".inc", ".pyi", ".pyc", ".typed"}
_COMMAND = """\
#!/usr/bin/python3
from vbus.cli import main

main()
"""


@dataclass(frozen=True)
class Entry:
    """A file of the guest: its place there, its content, whether it is a program."""

    place: str
    content: bytes
    program: bool = False


def entries(guest: Path = GUEST) -> list[Entry]:
    """Read the tree; `guest` has `init` and `agent.py`. Raises UnavailableError."""
    found = [
        Entry("usr/bin/vbus", _COMMAND.encode(), program=True),
        Entry("init", _own(guest / "init"), program=True),
        Entry(AGENT, _own(guest / "agent.py")),
    ]
    distribution = importlib.metadata.distribution("vbus")
    info = f"{SITE}/vbus-{distribution.version}.dist-info"
    for name in ("METADATA", "entry_points.txt", "top_level.txt"):
        found.append(
            Entry(f"{info}/{name}", (distribution.read_text(name) or "").encode())
        )
    for name in (distribution.read_text("top_level.txt") or "").split():
        found += _package(name)
    return found


def _own(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UnavailableError(f"this installation of vbus lacks {path}") from None


def _package(name: str) -> list[Entry]:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(f"the package {name} of vbus is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return [
        Entry(f"{SITE}/{name}/{path.relative_to(folder)}", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in _UNUSED
    ]


def digest(found: list[Entry]) -> str:
    """Give a name for what the tree is now."""
    state = hashlib.sha256()
    for entry in found:
        state.update(f"{entry.place}\0{len(entry.content)}\0".encode())
        state.update(entry.content)
    return state.hexdigest()[:16]


def write(found: list[Entry], folder: Path) -> None:
    """Lay the tree out in a folder, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    for entry in found:
        path = folder / entry.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.content)
        path.chmod(0o755 if entry.program else 0o644)
