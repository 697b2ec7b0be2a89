"""Typed attributes of a device: given in its configuration, shown and set at run time.

    mac_limit = attribute(int, default=1024, writable=True, doc="addresses kept")

An attribute is declared in the class body and read like any field of the device. The
device itself may assign any value of the type; values from outside go through
`Attribute.parse`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast, overload

from vbus.errors import InvalidError

if TYPE_CHECKING:
    from vbus.device import Device

T = TypeVar("T")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class _Required:
    """Stands for the default of an attribute which must be given."""


REQUIRED: Final = _Required()


def parse_bool(value: object) -> bool:
    """Take a bool, 0, 1 or one of the usual words."""
    if isinstance(value, bool):
        return value
    word = str(value).lower() if isinstance(value, int | str) else ""
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise InvalidError(f"{value!r} is neither true nor false")


def parse_int(value: object) -> int:
    """Take an int, or its text in any base that Python reads (0x10)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value, 0)
        except ValueError:
            pass
    raise InvalidError(f"{value!r} is no whole number")


def parse_str(value: object) -> str:
    """Take text only: a number in a configuration file is probably a slip."""
    if isinstance(value, str):
        return value
    raise InvalidError(f"{value!r} is not text")


_PARSERS: dict[object, Callable[[Any], Any]] = {
    bool: parse_bool,
    int: parse_int,
    str: parse_str,
}


@dataclass(slots=True, eq=False)
class Attribute(Generic[T]):
    """The declaration of one attribute; make it with `attribute()`."""

    parser: Callable[[Any], T]
    default: T | _Required
    writable: bool
    writable_while_open: bool
    doc: str
    name: str = ""

    def __set_name__(self, owner: type["Device"], name: str) -> None:
        self.name = name

    @property
    def required(self) -> bool:
        """Must the configuration give a value?"""
        return self.default is REQUIRED

    @overload
    def __get__(self, device: None, owner: type["Device"]) -> "Attribute[T]": ...
    @overload
    def __get__(self, device: "Device", owner: type["Device"]) -> T: ...
    def __get__(
        self, device: "Device | None", owner: type["Device"]
    ) -> "Attribute[T] | T":
        if device is None:
            return self
        return cast(T, device.__dict__.get(self.name, self.default))

    def __set__(self, device: "Device", value: T) -> None:
        device.__dict__[self.name] = value

    def parse(self, value: object) -> T:
        """Check a value from outside. Raises InvalidError that names the attribute."""
        try:
            return self.parser(value)
        except (ValueError, TypeError) as error:
            raise InvalidError(f"{self.name}: {error}") from None


def attribute(
    parser: Callable[[Any], T],
    *,
    default: T | _Required = REQUIRED,
    writable: bool = False,
    writable_while_open: bool = True,
    doc: str = "",
) -> Attribute[T]:
    """Declare an attribute of a Device subclass.

    `parser` is bool, int, str, or any callable that makes the value and raises
    ValueError (InvalidError is one). Without a default the configuration must give
    the value. Only a `writable` one can be set later, and not `writable_while_open`
    means: -EBUSY as long as a connection is open.
    """
    parser = _PARSERS.get(parser, parser)
    return Attribute(parser, default, writable, writable_while_open, doc)


def attributes_of(cls: type["Device"]) -> Iterator[Attribute[Any]]:
    """Iterate over the attributes of a class, its bases' first."""
    seen: dict[str, Attribute[Any]] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Attribute):
                seen[name] = value
            else:
                seen.pop(name, None)
    return iter(seen.values())
