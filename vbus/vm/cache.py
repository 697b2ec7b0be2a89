"""Folders that cost time to make, kept for the next time.

Each appears whole or not at all: it is made beside its place and renamed. Two makers
of one folder wait for each other. Not a store of anything that cannot be made again.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Say = Callable[[str], None]
# Nobody takes so long to make a folder.
_ABANDONED_S = 86400
# What was asked for so lately may be in use: a run of tests asks for its image once.
_IN_USE_S = 3600


def silent(words: str) -> None:
    """Say nothing."""


def root() -> Path:
    """Give the cache's folder: $XDG_CACHE_HOME/vbus, else ~/.cache/vbus."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vbus"


def folder(name: str, make: Callable[[Path], None], say: Say = silent) -> Path:
    """Give the cached folder `name`; `make` fills it if it is not there.

    Raises what `make` raises (then nothing stays) and OSError.
    """
    place = root() / name
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.parent / f".{name}.lock", say):
            if not place.is_dir():
                _make(place, make)
    os.utime(place)  # prune() goes by the time of the last use
    return place


def prune(prefix: str, keep: int) -> None:
    """Delete all but the `keep` folders used last whose names begin with `prefix`.

    Nobody may count on a folder that he has not asked for within an hour. What makers
    that were killed left behind goes, too.
    """
    for left in root().glob(f".{prefix}*.new-*"):
        if _used_s(left) < time.time() - _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    found = sorted(root().glob(f"{prefix}*"), key=_used_s, reverse=True)
    for place in found[keep:]:
        if _used_s(place) > time.time() - _IN_USE_S:
            continue
        shutil.rmtree(place, ignore_errors=True)
        (place.parent / f".{place.name}.lock").unlink(missing_ok=True)


def _used_s(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except FileNotFoundError:  # another process pruned it
        return 0


def _make(place: Path, make: Callable[[Path], None]) -> None:
    prefix = f".{place.name}.new-"
    for left in place.parent.glob(
        f"{prefix}*"
    ):  # its maker was killed: we have the lock
        shutil.rmtree(left, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        make(fresh)
        fresh.chmod(0o755)
        fresh.rename(place)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold a lock that dies with its process."""
    while True:
        with path.open("a") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that makes {path.name[1:-5]}")
                fcntl.flock(held, fcntl.LOCK_EX)
            if _is_at(path, held.fileno()):
                yield
                return


def _is_at(path: Path, fd: int) -> bool:
    """Tell whether the file is still at its path: prune() deletes locks."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False
