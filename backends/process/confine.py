"""What a backend's process gives up once it is welcome, and before it has any guest.

By then the daemon has said what devices there shall be, so that their classes can say
which files those open. A device that comes later has what is left: its class's own
things, and the paths of the configuration.
"""

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vbus.backend import wire
from vbus.bus import BusModel
from vbus.device import Device
from vbus.errors import PermissionDeniedError, VbusError
from vbus.isolation import Reach, isolate

log = logging.getLogger(__name__)


class Confinement:
    """How far a backend reaches: without bounds until `enter`."""

    def __init__(self, mode: str | None = None, paths: Sequence[Path] = ()) -> None:
        """Take what whoever started this process said; `mode` goes before the daemon's.

        `paths` are files and folders to open beside the daemon's.
        """
        self._mode = mode
        self._paths = tuple(paths)
        self._reach: Reach | None = None

    def enter(self, welcome: wire.Welcome, model: BusModel) -> None:
        """Give up all else for good. Raises what `isolate` does."""
        mode = self._mode or welcome.isolation
        if mode == "off":
            return
        classes = {name: model.device_class(name) for name in model.classes}
        wanted: list[tuple[type[Device], Mapping[str, object]]] = [
            (cls, {}) for cls in classes.values()
        ]
        wanted += [
            (classes[one.class_name], one.attributes)
            for one in welcome.devices
            if one.class_name in classes
        ]
        reach = _there(_together(cls.reach(_values(cls, said)) for cls, said in wanted))
        own = Reach(
            read=tuple(_code(classes.values())),
            write=(*self._paths, *map(Path, welcome.paths)),
        )
        self._reach = own.and_(reach)
        held = isolate(
            self._reach.read,
            self._reach.write,
            listen=self._reach.listen if self._reach.listens else None,
            required=mode == "required",
        )
        log.info("isolated: %s", held)

    def check(self, cls: type[Device], attributes: Mapping[str, object]) -> None:
        """Refuse a device that cannot open what it needs. Raises PermissionDeniedError.

        The kernel would refuse as well, but not say why.
        """
        if self._reach is None:
            return
        missing = self._reach.lacks(cls.reach(_values(cls, attributes)))
        if missing is not None:
            where = "" if missing.exists() else "not there, or "
            raise PermissionDeniedError(
                f"{missing} is {where}out of reach of this isolated backend: name it"
                " in the backend's paths, or have it there when the backend starts"
            )


def _values(cls: type[Device], attributes: Mapping[str, object]) -> dict[str, object]:
    """Give what is known of a device's attributes; one that is wrong is none."""
    values: dict[str, object] = {}
    for name, declared in cls.attributes.items():
        if name in attributes:
            try:
                values[name] = declared.parse(attributes[name])
            except VbusError:
                return {}
        elif not declared.required:
            values[name] = declared.default
    return values


def _together(found: Iterable[Reach]) -> Reach:
    reach = Reach()
    for one in found:
        reach = reach.and_(one)
    return reach


def _there(reach: Reach) -> Reach:
    """Leave out what does not exist: its device will say so."""
    read, write, listen = (
        tuple(path for path in paths if path.exists())
        for paths in (reach.read, reach.write, reach.listen)
    )
    return Reach(read, write, listen, reach.listens)


def _code(classes: Iterable[type[Device]]) -> Iterable[Path]:
    """Where classes that are not of this package import from."""
    for cls in classes:
        package = sys.modules[cls.__module__.partition(".")[0]]
        yield from map(Path, getattr(package, "__path__", ()))
