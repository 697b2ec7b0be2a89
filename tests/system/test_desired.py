"""`vbus save` and `vbus apply`: the running state as a file, and back."""

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.served import Served
from tests.system.test_plug import guest

CONFIG = """
[[bus]]
name = "bus0"
[[device]]
name = "lan0"
class = "switch"
mac_limit = 9
[[device]]
name = "lan0-g1"
class = "venet"
bus = "bus0"
switch = "lan0"
mtu = 1400
[[device]]
name = "echo0"
class = "echo"
bus = "bus0"
[[guest]]
name = "g1"
bus = "bus0"
spin_us = 0
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, CONFIG) as served:
        yield served


def apply(daemon: Served, text: str, *words: str) -> tuple[int, list[str], str]:
    """Apply a configuration: status, what was done or would be, what is said."""
    file = daemon.runtime / "desired.toml"
    file.write_text(text)
    done = daemon.vbus("apply", str(file), "--json", *words)
    steps = json.loads(done.stdout)["steps"] if done.stdout else []
    said = [f"{step['op']} {step['about'].split()[-1]}" for step in steps]
    errors = " ".join(step["error"] for step in steps if "error" in step)
    return done.returncode, said, errors + done.stderr


def changed(daemon: Served, *words: str) -> None:
    done = daemon.vbus(*words)
    assert done.returncode == 0, done.stderr


def test_what_is_saved_makes_the_same_again(daemon: Served, tmp_path: Path) -> None:
    """R11: live changes of every kind live through a new daemon."""
    saved = daemon.vbus("save").stdout
    assert tomllib.loads(saved) == tomllib.loads(CONFIG)
    changed(daemon, "bus", "add", "bus1")
    changed(daemon, "device", "set", "lan0", "mac_limit=16", "mac_age_s=60")
    changed(daemon, "device", "add", "e1", "--class", "echo", "--bus", "bus1")
    changed(daemon, "device", "link", "bus0", "e1")
    changed(daemon, "device", "del", "echo0")
    changed(daemon, "guest", "add", "g2", "--bus", "bus1", "--no-msix")
    file = tmp_path / "saved.toml"
    file.write_text("old")
    file.chmod(0o600)
    changed(daemon, "save", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    lan = tomllib.loads(file.read_text())["device"][0]
    assert lan == {"name": "lan0", "class": "switch", "mac_limit": 16, "mac_age_s": 60}
    (tmp_path / "again").mkdir()
    with Served(tmp_path / "again", file.read_text()) as again:
        for kind in ("bus", "device"):
            shown = again.ask(kind, "show")
            for one in shown:
                one.pop("links", None)
                one.pop("devices", None)  # ids are given anew
            first = daemon.ask(kind, "show")
            for one in first:
                one.pop("links", None)
                one.pop("devices", None)
            assert shown == first
        assert again.vbus("save").stdout == file.read_text()
        assert apply(again, file.read_text()) == (0, [], "")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    daemon: Served, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").mkdir()
    done = daemon.vbus("save", str(folder / "file"))
    assert done.returncode == 1
    assert os.listdir(folder) == ["file"]


def test_a_dry_run_shows_and_changes_nothing(daemon: Served) -> None:
    before = daemon.ask("tree")
    desired = CONFIG.replace("mac_limit = 9", "mac_limit = 10").replace("echo0", "e2")
    status, said, _ = apply(daemon, desired, "--dry-run")
    assert status == 0
    assert said == ["device.remove echo0", "device.set lan0", "device.add e2"]
    file = daemon.runtime / "desired.toml"
    shown = daemon.vbus("apply", str(file), "-n").stdout
    assert shown.splitlines() == [
        "- device echo0",
        "~ device lan0",
        "    mac_limit: 9 -> 10",
        "+ device e2: class echo, on bus0",
    ]
    assert daemon.ask("tree") == before
    status, again, _ = apply(daemon, desired)
    assert (status, again) == (0, said)
    assert apply(daemon, desired) == (0, [], "")
    assert tomllib.loads(daemon.vbus("save").stdout)["device"][2]["name"] == "e2"


def test_what_is_the_same_keeps_its_connections(daemon: Served) -> None:
    """R11: a guest with devices open does not notice what is not its own."""
    with guest(daemon) as lines:
        starting = {"echo0", "lan0-g1"}
        while starting:  # whichever is first
            starting.discard(lines.until(state="running")["name"])
        opens = daemon.ask("stats", "guests/g1/bridge")["opens"]
        text = CONFIG.replace("mac_limit = 9", "mac_limit = 11")
        text += "[[device]]\nname = 'e3'\nclass = 'echo'\nbus = 'bus0'\n"
        assert apply(daemon, text)[:2] == (0, ["device.set lan0", "device.add e3"])
        lines.until(name="e3", state="running")
        assert daemon.ask("stats", "guests/g1/bridge")["opens"] == opens + 1
        assert daemon.ask("stats", "guests/g1/bridge")["closes"] == 0


def test_what_is_in_use_is_made_anew_only_by_force(daemon: Served) -> None:
    with guest(daemon) as lines:
        lines.until(name="lan0-g1", state="running")
        text = CONFIG.replace("mtu = 1400", "mtu = 1300").replace("= 9", "= 12")
        status, said, errors = apply(daemon, text)
        assert (status, len(said)) == (1, 3)
        assert "in use by g1" in errors
        [port] = daemon.ask("device", "show", "lan0-g1")
        assert port["attributes"]["mtu"] == 1400
        [lan] = daemon.ask("device", "show", "lan0")
        assert lan["attributes"]["mac_limit"] == 12  # the rest was done
        status, said, errors = apply(daemon, text, "--force")
        assert (status, errors) == (0, "")
        lines.until(name="lan0-g1", state="gone")
        assert lines.until(name="lan0-g1", state="running")
    [port] = daemon.ask("device", "show", "lan0-g1")
    assert port["attributes"]["mtu"] == 1300


def test_as_much_as_possible_is_done_and_the_rest_is_told(daemon: Served) -> None:
    """A step that fails, here for want of its switch, does not end the others."""
    text = CONFIG + (
        "[[device]]\nname = 'p'\nclass = 'venet'\nswitch = 'late'\n"
        "[[device]]\nname = 'q'\nclass = 'venet'\nswitch = 'nonesuch'\n"
        "[[device]]\nname = 'late'\nclass = 'switch'\n"
    )
    status, said, errors = apply(daemon, text)
    assert status == 1
    assert said == ["device.add p", "device.add q", "device.add late"]
    assert errors == "no device 'nonesuch'"
    names = [one["name"] for one in daemon.ask("device", "show")]
    assert names == ["lan0", "lan0-g1", "echo0", "late", "p"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[bus]]\nname = 3", "bus[0].name"),
        ("[[bus]\n", "desired.toml"),
        ("[[guest]]\nname = 'g'\nbus = 'x'", "guest g: no bus 'x'"),
        ("[[device]]\nname = 'd'\nclass = 'x'", "device d: no device class 'x'"),
        ("[[device]]\nname = 'd'\nclass = 'echo'\nx = 1", "no attribute 'x'"),
        ("[[device]]\nname = 'd'\nclass = 'venet'", "'switch' is missing"),
        ("[[device]]\nname = 'd'\nclass = 'switch'\nmac_limit = 'x'", "mac_limit"),
        ("[[device]]\nname = 'D'\nclass = 'switch'", "bad name 'D'"),
    ],
)
def test_a_wrong_file_changes_nothing_at_all(
    daemon: Served, text: str, message: str
) -> None:
    before = daemon.ask("tree")
    status, _, said = apply(daemon, text)
    assert status == 1
    assert message in said
    assert daemon.ask("tree") == before


def test_what_only_a_new_daemon_can_change_is_told(daemon: Served) -> None:
    status, said, errors = apply(daemon, CONFIG + "[daemon]\nruntime_dir = '/x'\n")
    assert (status, said) == (1, ["daemon.set daemon"])
    assert "restart" in errors


def test_several_attributes_are_set_or_none(daemon: Served) -> None:
    done = daemon.vbus("device", "set", "lan0", "mac_limit=5", "mac_age_s=0")
    assert done.returncode == 1
    [lan] = daemon.ask("device", "show", "lan0")
    assert lan["attributes"]["mac_limit"] == 9


def test_what_is_no_longer_given_goes_back_to_its_default(daemon: Served) -> None:
    """And zero is a value; the address a device chose itself is as good as given."""
    [port] = daemon.ask("device", "show", "lan0-g1")
    mac = port["attributes"]["client_mac"]
    text = CONFIG.replace("mac_limit = 9\n", "").replace(
        "mtu = 1400", f"mtu = 1400\ntxmitigation = 0\nclient_mac = '{mac}'"
    )
    assert apply(daemon, text)[1:] == (["device.set lan0", "device.set lan0-g1"], "")
    [lan] = daemon.ask("device", "show", "lan0")
    assert lan["attributes"]["mac_limit"] == 1024
    [port] = daemon.ask("device", "show", "lan0-g1")
    assert port["attributes"]["txmitigation"] == 0
    assert apply(daemon, text) == (0, [], "")
