"""The Debian package: really built, unpacked into a throw-away root, and run there."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.served import WITHIN_S, Served

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
BUILD_LIMIT_S = 600
NEEDED = ("dpkg-buildpackage", "dh", "dh_python3", "/usr/bin/python3", "git")


def missing() -> str:
    for program in NEEDED:
        if shutil.which(program) is None:
            return f"no {program}: apt-get install debhelper dh-python git"
    for module in ("pip", "venv"):
        words = ["/usr/bin/python3", "-c", f"import {module}"]
        if subprocess.run(words, capture_output=True).returncode:
            return f"apt-get install python3-{module}"
    return ""


def test_its_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head = (PACKAGING / "debian" / "changelog").read_text().splitlines()[0]
    assert head.startswith(f"vbus ({project['version']}) ")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package; built once. It needs the network, as installing vbus does."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("deb")
    done = subprocess.run(
        [PACKAGING / "build-deb", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def root(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is in the package, and nothing installed."""
    folder = tmp_path_factory.mktemp("root")
    subprocess.run(["dpkg", "-x", package, folder], check=True)
    return folder


def field(package: Path, name: str) -> str:
    words = ["dpkg-deb", "--field", str(package), name]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_it_lists_what_a_service_needs(package: Path) -> None:
    words = ["dpkg-deb", "--contents", str(package)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=5) for line in done.stdout.splitlines()]
    files = {fields[5]: fields for fields in lines}
    for path in (
        "./usr/bin/vbus",
        "./etc/vbus/vbus.toml",
        "./lib/systemd/system/vbusd.service",
        "./lib/systemd/system/vbusd.socket",
        "./lib/systemd/system/vbus-backend@.service",
        "./usr/lib/sysusers.d/vbus.conf",
        "./usr/lib/tmpfiles.d/vbus.conf",
        "./usr/share/man/man1/vbus-serve.1.gz",
        "./usr/share/bash-completion/completions/vbus",
        "./usr/share/zsh/vendor-completions/_vbus",
        "./usr/share/fish/vendor_completions.d/vbus.fish",
        "./usr/lib/vbus/shm/_core.abi3.so",
    ):
        assert path in files, path
    assert {fields[1] for fields in lines} == {"root/root"}
    assert not any("/tests/" in path and "usr/lib/vbus/vbus" in path for path in files)
    assert re.search(r"python3 \(>= 3\.\d+", field(package, "Depends"))
    assert field(package, "Version") in (PACKAGING / "debian/changelog").read_text()


@pytest.mark.slow
def test_nothing_in_it_names_where_it_was_built(package: Path, root: Path) -> None:
    """As bytes: compiled files and records of pip too."""
    place = str(package.parent).encode()
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 500
    assert [path for path in files if place in path.read_bytes()] == []


@pytest.mark.slow
def test_its_manual_is_that_of_its_commands(root: Path) -> None:
    text = gzip.decompress((root / "usr/share/man/man1/vbus-serve.1.gz").read_bytes())
    assert b"vbus\\-serve \\- Run the bus daemon" in text


class Packaged(Served):
    """The daemon of the unpacked package, by its own program and Python."""

    def __init__(self, root: Path, folder: Path, config: str) -> None:
        self.program = root / "usr" / "bin" / "vbus"
        super().__init__(folder, config)

    def start(self) -> "subprocess.Popen[bytes]":
        path = self.log.parent / "vbus.toml"
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [self.program, "serve", "--config", path],
                env=self.environment,
                stderr=log,
            )

    def vbus(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.program, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
        )


@pytest.fixture
def packaged(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Packaged]:
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    config = "[[bus]]\nname = 'bus0'\n[[device]]\nname = 'echo0'\nclass = 'echo'\n"
    config += "bus = 'bus0'\n[[guest]]\nname = 'g1'\nbus = 'bus0'\n"
    with Packaged(root, tmp_path, config) as made:
        yield made


@pytest.mark.slow
def test_it_runs_from_where_it_was_unpacked(packaged: Packaged, root: Path) -> None:
    """Daemon, commands and a guest, with the compiled cores and no other vbus."""
    assert packaged.ask("guest", "show")[0]["name"] == "g1"
    maps = Path(f"/proc/{packaged.process.pid}/maps").read_text()
    cores = {line.split()[-1] for line in maps.splitlines() if "_core.abi3" in line}
    assert cores
    assert all(path.startswith(str(root)) for path in cores)
    assert os.readlink(f"/proc/{packaged.process.pid}/exe").startswith("/usr/bin/")
    guest = subprocess.Popen(
        [packaged.program, "guest", "run", packaged.socket("g1"), "--json"],
        env=packaged.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert guest.stdout is not None
        assert json.loads(guest.stdout.readline())
        assert packaged.ask("guest", "show")[0]["attached"]
        guest.send_signal(signal.SIGTERM)
        guest.communicate(timeout=WITHIN_S)
        assert guest.returncode == 0
    finally:
        guest.kill()
        guest.wait()
    assert packaged.stop() == 0
