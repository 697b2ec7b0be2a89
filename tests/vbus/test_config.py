"""The configuration file: what it gives, and that each mistake names its place."""

from pathlib import Path

import pytest

from vbus.config import Config, DeviceConfig, GuestConfig, load, parse, runtime_dir
from vbus.errors import ConfigError

WHOLE = """
[daemon]
runtime_dir = "/run/other"

[[bus]]
name = "bus0"

[[device]]
name = "lan0"
class = "switch"
mac_limit = 16

[[device]]
name = "port1"
class = "venet"
bus = ["bus0", "bus1"]
switch = "lan0"
spin_us = 20

[[guest]]
name = "g1"
bus = "bus0"
msix = false
"""


def test_a_whole_file_gives_buses_devices_with_their_attributes_and_guests() -> None:
    config = parse(WHOLE)
    assert config.daemon.runtime_dir == "/run/other"
    assert [bus.name for bus in config.buses] == ["bus0"]
    assert config.devices == (
        DeviceConfig("lan0", "switch", (), {"mac_limit": 16}),
        DeviceConfig(
            "port1", "venet", ("bus0", "bus1"), {"switch": "lan0", "spin_us": 20}
        ),
    )
    assert config.guests == (GuestConfig("g1", "bus0", msix=False),)


def test_an_empty_file_is_an_empty_daemon() -> None:
    assert parse("") == Config()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[[bus]]\n", r"bus\[0\].*name"),
        ("[[bus]]\nname = 1\n", r"bus\[0\]\.name"),
        ("[[guest]]\nname = 'g'\nbus = 'b'\nmsi = true\n", r"guest\[0\].*msi"),
        ("[[device]]\nname = 'd'\n", r"device\[0\].*class"),
        (
            "[[device]]\nname='d'\nclass='c'\n[[device]]\nname='e'\nclass='c'\nbus=1\n",
            r"device\[1\]\.bus",
        ),
        *(
            (f"[[guest]]\nname = 'g'\nbus = 'b'\n{key} = {value}\n", rf"\.{key}")
            for key, value in (
                ("spin_us", "-1"),
                ("spin_us", "inf"),
                ("spin_us", "nan"),
                ("call_timeout_s", "0"),
                ("call_timeout_s", "nan"),
                ("uid", "-1"),
                ("uid", "4294967295"),
            )
        ),
        ("[deamon]\n", "deamon"),
        ("[[bus]\n", "line 1"),
        ("[[bus]]\nname = 'b'\n[[bus]]\nname = 'b'\n", r"bus\[1\]\.name: .*'b'"),
        (
            "[[guest]]\nname='g'\nbus='b'\n[[guest]]\nname='g'\nbus='c'\n",
            r"guest\[1\]\.name: a second 'g'",
        ),
        (
            "[[device]]\nname='d'\nclass='c'\n[[device]]\nname='d'\nclass='e'\n",
            r"device\[1\]\.name: a second 'd'",
        ),
    ],
)
def test_a_mistake_names_its_place(text: str, place: str) -> None:
    with pytest.raises(ConfigError, match=place):
        parse(text)


def test_the_message_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vbus.toml"
    with pytest.raises(ConfigError, match=r"vbus\.toml: No such file"):
        load(path)
    path.write_text("[[bus]]\n")
    with pytest.raises(ConfigError, match=r"vbus\.toml: bus"):
        load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"vbus\.toml: .*utf-8"):
        load(path)


def test_a_configuration_knows_its_file(tmp_path: Path) -> None:
    """What is refused later can still name it."""
    path = tmp_path / "vbus.toml"
    path.write_text(WHOLE)
    config = load(path)
    assert config.source == str(path)
    assert config.guests == parse(WHOLE).guests


def test_the_environment_names_the_runtime_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VBUS_RUNTIME_DIR", "/somewhere")
    assert runtime_dir() == Path("/somewhere")
    assert runtime_dir("/configured") == Path("/somewhere")
    monkeypatch.delenv("VBUS_RUNTIME_DIR")
    assert runtime_dir("/configured") == Path("/configured")


def test_without_it_root_and_users_have_directories_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VBUS_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert runtime_dir() == Path("/run/vbus")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert runtime_dir() == Path("/run/user/1000/vbus")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ConfigError, match="neither"):
        runtime_dir()
