"""The project's own rules: layers, packaging, names, fragments."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shm", "ioq", "vbus", "backends", "proxy")
FOLDERS = (*PACKAGES, "tests", "bench", "docs", "examples", "news", "scripts", ".ci")
GROUPS = ("vbus.device_classes", "vbus.commands", "vbus.drivers", "console_scripts")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def texts() -> Iterator[tuple[Path, str]]:
    """All text of the project that a person wrote."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in files:
        if path.suffix not in (".so", ".pyc") and path.name != ".coverage":
            yield path.relative_to(ROOT), path.read_text(errors="replace")


def test_layers_import_only_what_lies_below_them() -> None:
    """The contract of pyproject.toml holds, by import-linter."""
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout.decode()


def test_no_file_names_a_place_of_one_machine() -> None:
    """Nothing in the project depends on where somebody keeps it."""
    place = re.compile(r"/(home|root|work|Users)/\w")
    found = [str(path) for path, text in texts() if place.search(text)]
    assert not found


def test_installed_version_is_that_of_the_project() -> None:
    """There is one version, in pyproject.toml; the code asks the installation."""
    assert version("vbus") == project()["project"]["version"]
    assigned = re.compile(r"^_*version_*\s*=\s*[\"']", re.MULTILINE | re.IGNORECASE)
    found = [str(path) for path, text in texts() if assigned.search(text)]
    assert found == ["pyproject.toml"]


@pytest.mark.parametrize("group", GROUPS)
def test_entry_points_lead_somewhere(group: str) -> None:
    """R11: device classes, drivers and commands are found by entry point."""
    ours = [entry for entry in entry_points(group=group) if entry.dist is not None]
    ours = [entry for entry in ours if entry.dist and entry.dist.name == "vbus"]
    assert ours
    for entry in ours:
        assert callable(entry.load()), entry


def test_every_package_is_packaged() -> None:
    """Each folder with modules is in setuptools' list, and nothing else is."""
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    folders = {path.parent.relative_to(ROOT) for path in modules}
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def test_every_package_is_typed() -> None:
    """A user's type checker believes the annotations."""
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


def test_news_fragments_are_well_formed() -> None:
    """Each is named as towncrier wants it, and is a sentence or more."""
    named = re.compile(r"(\d+|\+[\w-]+)\.(feature|bugfix|doc|removal|misc)(\.\d+)?\.md")
    for path in (ROOT / "news").iterdir():
        if path.name == "README.md":
            continue
        assert named.fullmatch(path.name), path.name
        text = path.read_text()
        assert text.endswith(".\n"), path.name
        assert max(map(len, text.splitlines())) <= 88, path.name


@pytest.mark.parametrize("script", [".ci/run", "scripts/python-ready"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    """A clone can run them at once."""
    assert os.access(ROOT / script, os.X_OK)
    shell = "bash" if "bash" in (ROOT / script).read_text().splitlines()[0] else "sh"
    subprocess.run([shell, "-n", ROOT / script], check=True)


@pytest.mark.parametrize("target", ["build", "demo", "demo-json", "test", "check"])
def test_make_knows_its_targets(target: str) -> None:
    """What the README and CI call is there."""
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
