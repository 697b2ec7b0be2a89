"""Finding the Debian archive in apt's sources; refusals that say what is missing."""

from pathlib import Path

import pytest

from vbus.vm import debian
from vbus.vm.debian import Apt, Archive, UnavailableError, archive

KEY = "/usr/share/keyrings/some.gpg"


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DEBIAN_MIRROR", raising=False)
    monkeypatch.setattr(debian, "_KEYRING", tmp_path / "none.gpg")
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_one_line_sources_with_options_comments_and_tabs(apt: Path) -> None:
    (apt / "sources.list").write_text(
        "# deb http://no/debian trixie main\n"
        "deb-src http://src/debian trixie main\n"
        "deb http://sec/debian-security trixie-security main\n"
        "deb\t[arch=amd64 signed-by=/k.gpg]\thttp://yes/debian\ttrixie main # x\n"
    )
    assert archive(apt) == Archive("http://yes/debian", (("Signed-By", "/k.gpg"),))


def test_deb822_sources_with_a_key_inside(apt: Path) -> None:
    (apt / "sources.list.d/debian.sources").write_text(
        "Types: deb\nURIs: http://off/debian\nSuites: trixie\nComponents: main\n"
        "Enabled: no\n\n"
        "# a comment\nTypes: deb deb-src\nURIs: http://yes/debian\n"
        "Suites: trixie\n trixie-updates\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    )
    found = archive(apt)
    assert found.uri == "http://yes/debian"
    assert dict(found.trust)["Signed-By"].endswith("BLOCK-----\n .\n abc")


def test_a_mirror_goes_before_others_that_borrow_debians_suites(apt: Path) -> None:
    (apt / "sources.list.d/a.list").write_text("deb http://browser/deb stable main\n")
    (apt / "sources.list.d/z.list").write_text("deb http://m/debian/ bookworm main\n")
    assert archive(apt).uri == "http://m/debian/"


def test_the_environment_overrides(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBIAN_MIRROR", "http://other/debian")
    assert archive(apt) == Archive("http://other/debian")


def test_without_a_debian_archive_the_message_names_the_variable(apt: Path) -> None:
    (apt / "sources.list.d/u.list").write_text("deb http://u/ubuntu noble main\n")
    with pytest.raises(UnavailableError, match="set DEBIAN_MIRROR"):
        archive(apt)


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Arm:
        machine = "aarch64"

    monkeypatch.setattr("os.uname", Arm)
    with pytest.raises(UnavailableError, match="x86_64, not aarch64"):
        debian.require_amd64()


def test_no_network_is_one_line_that_names_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBIAN_MIRROR", f"file:{tmp_path}/nothing/debian")
    with pytest.raises(UnavailableError) as refusal:
        Apt(tmp_path / "apt", ("trixie",))
    assert f"cannot be had from file:{tmp_path}/nothing/debian" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UnavailableError, match="this needs the program no-such-program"
    ):
        debian.run(["no-such-program"])


def test_only_the_settings_for_fetching_are_taken_over() -> None:
    lines = debian._acquire_settings().splitlines()
    assert all(line.startswith("Acquire::") for line in lines)
