"""Programs of another Debian release, without installing anything or being root.

apt resolves packages against an empty status in a folder of its own and only
downloads; dpkg unpacks them into a folder; a program of that folder runs with the
loader and libraries of that folder. The archive is the one that this machine's apt
uses. Not a chroot: maintainer scripts do not run.
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vbus.errors import NotFoundError, VbusError
from vbus.vm.cache import Say, silent

LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = "lib64/ld-linux-x86-64.so.2"
_APT = Path("/etc/apt")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_RELEASES = (
    *("bullseye", "bookworm", "trixie", "forky", "duke", "sid"),
    *("oldoldstable", "oldstable", "stable", "testing", "unstable"),
)
# Packages see /bin and the others as links into /usr.
_MERGED = ("bin", "sbin", "lib", "lib64")


class UnavailableError(VbusError):
    """Something that has to be fetched or made for a virtual machine cannot be had."""


@dataclass(frozen=True)
class Archive:
    """Where a Debian archive is, and whose signature it bears.

    `trust` are further fields of a deb822 source: Signed-By (a path or a whole key)
    or Trusted.
    """

    uri: str
    trust: tuple[tuple[str, str], ...] = ()


def archive(apt: Path = _APT) -> Archive:
    """Give the archive that apt's sources name; $DEBIAN_MIRROR goes before.

    Raises UnavailableError.
    """
    mirror = os.environ.get("DEBIAN_MIRROR")
    if mirror:
        return _with_keyring(Archive(mirror))
    listed = [*sorted(apt.glob("sources.list")), *sorted(apt.glob("sources.list.d/*"))]
    found = [one for path in listed for one in _archives(path)]
    # Others, too, name their suites after Debian's: prefer what looks like a mirror.
    found.sort(key=lambda one: not one.uri.rstrip("/").endswith("/debian"))
    if found:
        return _with_keyring(found[0])
    raise UnavailableError(
        f"no Debian archive in the sources under {apt}: set DEBIAN_MIRROR to one"
    )


def _with_keyring(one: Archive) -> Archive:
    if one.trust or not _KEYRING.exists():
        return one
    return Archive(one.uri, (("Signed-By", str(_KEYRING)),))


def _archives(path: Path) -> Iterable[Archive]:
    text = path.read_text(errors="replace")
    if path.suffix == ".list":
        stanzas = [_stanza_of_line(line) for line in text.splitlines()]
    elif path.suffix == ".sources":
        stanzas = [_stanza(lines) for lines in _paragraphs(text)]
    else:
        return
    for stanza in stanzas:
        if _is_debian(stanza):
            trust = tuple(
                (name, stanza[name.lower()])
                for name in ("Signed-By", "Trusted")
                if name.lower() in stanza
            )
            for uri in stanza["uris"].split():
                if not uri.startswith("cdrom:"):
                    yield Archive(uri, trust)


def _is_debian(stanza: Mapping[str, str]) -> bool:
    """Tell whether a source is a main Debian archive, not security or another's."""
    return (
        "deb" in stanza.get("types", "").split()
        and stanza.get("enabled", "yes").lower() not in ("no", "false", "0")
        and "main" in stanza.get("components", "").split()
        and any(suite in _RELEASES for suite in stanza.get("suites", "").split())
        and "uris" in stanza
    )


def _stanza_of_line(line: str) -> dict[str, str]:
    """Read `deb [option=value ...] URI SUITE COMPONENT...` (sources.list(5))."""
    line = line.partition("#")[0].strip()
    kind, rest = [*line.split(None, 1), "", ""][:2]
    options: dict[str, str] = {}
    if rest.startswith("["):
        inside, _, rest = rest[1:].partition("]")
        for option in inside.split():
            key, _, value = option.partition("=")
            options[key.lower()] = value.replace(",", " ")
    words = rest.split()
    if len(words) < 2:
        return {}
    uri, suite, *components = words
    return options | {
        "types": kind,
        "uris": uri,
        "suites": suite,
        "components": " ".join(components),
    }


def _paragraphs(text: str) -> Iterable[list[str]]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if line.strip():
            lines.append(line)
        elif lines:
            yield lines
            lines = []


def _stanza(lines: list[str]) -> dict[str, str]:
    """Read one paragraph of deb822; a value keeps its continuation lines."""
    fields: dict[str, str] = {}
    key = ""
    for line in lines:
        if line[0].isspace():
            fields[key] = f"{fields.get(key, '')}\n{line}"
        else:
            key, _, value = line.partition(":")
            key = key.strip().lower()
            fields[key] = value.strip()
    return fields


class Apt:
    """apt with a state of its own in `folder`, for packages of the `suites` named.

    The machine's proxies and other `Acquire` settings hold; its hooks, pins and
    installed packages do not. Raises UnavailableError: not amd64, no apt, no network.
    """

    def __init__(self, folder: Path, suites: Sequence[str], say: Say = silent) -> None:
        self._folder = folder
        self._suites = tuple(suites)
        self._environment = os.environ | {"LC_ALL": "C"}
        require_amd64()
        source = archive()
        self._uri = source.uri
        say(f"asking {source.uri} for the packages of {' and '.join(suites)}")
        self._set_up(source)
        self._apt("update", "--error-on=any")

    def download(self, *packages: str) -> list[Path]:
        """Fetch these packages and all that they need; give their .deb files."""
        archives = self._folder / "cache/archives"
        self._apt("--download-only", "-t", self._suites[-1], "install", *packages)
        return sorted(archives.glob("*.deb"))

    def download_only(self, package: str, into: Path) -> Path:
        """Fetch one package and nothing that it needs."""
        into.mkdir(parents=True)
        self._apt("-t", self._suites[-1], "download", package, cwd=into)
        return next(into.glob("*.deb"))

    def newest_dependency(self, package: str, prefix: str) -> str:
        """Give what `package` depends on whose name begins so (of a meta package)."""
        words = run(["apt-cache", "depends", package], env=self._environment).split()
        for before, name in itertools.pairwise(words):
            if before == "Depends:" and name.startswith(prefix):
                return name
        raise UnavailableError(f"{package} depends on no {prefix}*")

    def _set_up(self, source: Archive) -> None:
        a = self._folder
        for name in ("lists/partial", "cache/archives/partial", "sources", "none"):
            (a / name).mkdir(parents=True)
        (a / "status").touch()
        fields = {
            "Types": "deb",
            "URIs": source.uri,
            "Suites": " ".join(self._suites),
            "Components": "main",
            **dict(source.trust),
        }
        lines = [f"{name}: {value}\n" for name, value in fields.items()]
        (a / "sources/debian.sources").write_text("".join(lines))
        (a / "apt.conf").write_text(f"{_acquire_settings()}{_SETTINGS.format(a=a)}")
        self._environment["APT_CONFIG"] = str(a / "apt.conf")

    def _apt(self, *words: str, cwd: Path | None = None) -> None:
        try:
            run(["apt-get", "-qq", "-y", *words], env=self._environment, cwd=cwd)
        except UnavailableError as error:
            raise UnavailableError(
                f"Debian packages cannot be had from {self._uri}: {error}"
            ) from None


_SETTINGS = """
Dir::State "{a}";
Dir::State::lists "{a}/lists";
Dir::State::status "{a}/status";
Dir::Cache "{a}/cache";
Dir::Cache::archives "{a}/cache/archives";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "{a}/none";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{a}/sources";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "{a}/none";
APT::Architecture "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
"""


def _acquire_settings() -> str:
    """Give the machine's settings for fetching: proxies, time limits, certificates."""
    lines = run(["apt-config", "dump"]).splitlines()
    kept = [line for line in lines if line.startswith("Acquire::")]
    return "".join(f"{line}\n" for line in kept)


def require_amd64() -> None:
    """Refuse a machine whose programs are not x86-64."""
    machine = os.uname().machine
    if machine != "x86_64":
        raise UnavailableError(f"virtual machines are made for x86_64, not {machine}")


def unpack(debs: Iterable[Path], root: Path) -> None:
    """Unpack .deb files into `root`. Raises UnavailableError, OSError."""
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        run(["dpkg", "-x", str(deb), str(root)])


def program(root: Path, name: str) -> list[str]:
    """Give the words that start a program of an unpacked root. Raises NotFoundError."""
    for folder in ("usr/bin", "usr/sbin"):
        path = root / folder / name
        if path.exists():
            return [
                *(str(root / LOADER), "--argv0", name),
                *("--library-path", str(root / LIBRARIES), str(path)),
            ]
    raise NotFoundError(f"no program {name} in {root}")


def run(
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a program of this machine to its end; give what it printed.

    Raises UnavailableError with its first complaint.
    """
    if shutil.which(words[0]) is None:
        raise UnavailableError(f"this needs the program {words[0]}")
    done = subprocess.run(
        words,
        env=env,
        cwd=cwd,
        check=False,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    if done.returncode:
        raise UnavailableError(_complaint(done.stderr) or f"{words[0]} failed")
    return done.stdout


def _complaint(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "ERROR", "error"))]
    return (errors or lines or [""])[0]
