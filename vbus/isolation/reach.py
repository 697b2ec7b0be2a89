"""What of the machine a device opens by itself, beside descriptors it is given."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Reach(NamedTuple):
    """Files and folders; a folder means all that lies in it.

    `write` includes reading. `listen` are folders in which unix sockets are made that
    others connect to; `listens` says that there may be such sockets at all.
    """

    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    listen: tuple[Path, ...] = ()
    listens: bool = False

    def and_(self, other: "Reach") -> "Reach":
        """Both."""
        return Reach(
            self.read + other.read,
            self.write + other.write,
            self.listen + other.listen,
            self.listens or other.listens,
        )

    def lacks(self, wanted: "Reach") -> Path | None:
        """Give a path that `wanted` has and this has not."""
        anyhow = self.write
        for paths, within in (
            (wanted.read, self.read + anyhow),
            (wanted.write, anyhow),
            (wanted.listen, self.listen + anyhow),
        ):
            for path in paths:
                if not _below(path, within):
                    return path
        return None


def _below(path: Path, folders: Iterable[Path]) -> bool:
    found = path.resolve()
    return any(found.is_relative_to(folder.resolve()) for folder in folders)
