"""The part of the guest that does not change: Debian's kernel, programs and Python.

A folder with `vmlinux`, `base.cpio` and `root` (what is in the archive, kept because
the guest's own Python compiles what is added later). What a guest never reads is left
out: QEMU, and the kernel in the guest, pay for each byte at each boot.
"""

import importlib.metadata
import importlib.util
import lzma
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vbus.vm import cpio
from vbus.vm.cache import Say
from vbus.vm.debian import LIBRARIES, Apt, UnavailableError, program, run, unpack
from vbus.vm.elf import keep_needed_libraries
from vbus.vm.kernel import extract_vmlinux

SUITE = "trixie"
KERNEL = "linux-image-cloud-amd64"
PYTHON = "python3.13"
PACKAGES = (
    "busybox-static",
    "python3",
    "pciutils",
    "iperf3",
    "iproute2",
    "ethtool",
    "e2fsprogs",
    "kmod",
)
# Needed to make the image, not in it.
_TOOLS = ("zstd",)
MODULES = (
    *("qemu_fw_cfg", "virtio_net", "virtio_blk", "virtio-rng", "virtio-iommu"),
    *("uio_pci_generic", "vfio-pci", "vfio_iommu_type1", "tun", "veth", "bridge"),
    *("nbd", "ublk_drv", "ext4", "msr"),
)
SITE = "usr/lib/python3/dist-packages"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

# Come with the packages above but serve only their installation.
_UNUSED_PACKAGES = (
    *(
        "perl-base",
        "dpkg",
        "tar",
        "debconf",
        "passwd",
        "login",
        "base-passwd",
        "adduser",
    ),
    *("libpam-modules", "libpam-modules-bin", "libpam-runtime", "sed", "logsave"),
    *("media-types", "readline-common", "sensible-utils", "psmisc"),
    *(
        "init-system-helpers",
        "libssl-dev",
        "netbase",
        "krb5-locales",
        "libsemanage-common",
    ),
)
_UNREAD_PYTHON = (
    *("test", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "config-*"),
    *("pydoc_data", "pydoc.py", "turtle.py", "__phello__", "__pycache__"),
)
_UNREAD = (
    *(
        "usr/bin/zstd*",
        "usr/bin/unzstd",
        "usr/bin/pzstd",
        "usr/bin/perl*",
        "usr/bin/py3*",
    ),
    *(
        "usr/share/*",
        "usr/games",
        "usr/include",
        "usr/lib/systemd",
        "usr/lib/tmpfiles.d",
    ),
    *("usr/lib/udev", "usr/lib/valgrind", "usr/lib/modprobe.d", "usr/lib/sysusers.d"),
    *("var", "etc/*", "usr/libexec", "usr/src", "usr/lib/initramfs-tools"),
    *(f"{LIBRARIES}/{name}" for name in ("gconv", "audit", "perl-base", "security")),
    *(f"{LIBRARIES}/{name}" for name in ("engines-3", "krb5", "ossl-modules", "tc")),
    *(f"usr/lib/{PYTHON}/{name}" for name in _UNREAD_PYTHON),
    *(f"{SITE}/bin", f"{SITE}/**/tests", f"{SITE}/**/_tests", f"{SITE}/**/*.pyi"),
    f"{SITE}/**/__pycache__",
)
# lspci names what it shows.
_READ = ("usr/share/misc/pci.ids",)
_FOLDERS = ("proc", "sys", "dev", "run", "tmp", "root", "etc", "var/tmp", "mnt")
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/hostname": "guest\n",
}


@dataclass(frozen=True)
class Recipe:
    """What a base is made of: Debian packages beyond ours, and pip requirements."""

    packages: tuple[str, ...]
    requirements: tuple[str, ...]


def recipe(packages: Sequence[str] = ()) -> Recipe:
    """Give the recipe for the installed vbus and `packages` more."""
    wanted = importlib.metadata.requires("vbus") or []
    needed = sorted(word for word in wanted if "extra ==" not in word)
    return Recipe(tuple(sorted(set(packages))), tuple(needed))


def make(folder: Path, what: Recipe, say: Say) -> None:
    """Make a base in an empty folder. Raises UnavailableError, OSError."""
    apt = Apt(folder / "apt", (SUITE,), say)
    kernel, root = folder / "kernel", folder / "root"
    say("fetching the guest's kernel and programs")
    image = apt.newest_dependency(KERNEL, "linux-image-")
    unpack([apt.download_only(image, folder / "deb")], kernel)
    debs = apt.download(*PACKAGES, *_TOOLS, *what.packages)
    say(f"unpacking {len(debs)} packages")
    unpack((deb for deb in debs if not _is_unused(deb)), root)
    version = next(kernel.glob("boot/vmlinuz-*")).name.removeprefix("vmlinuz-")
    bz_image = (kernel / f"boot/vmlinuz-{version}").read_bytes()
    (folder / "vmlinux").write_bytes(extract_vmlinux(bz_image, program(root, "zstd")))
    say("fetching Python packages")
    _install(what.requirements, root / SITE)
    say("packing the guest")
    _strip(root, thorough=not what.packages)
    _add_modules(kernel / "usr/lib/modules" / version, root)
    _finish(root)
    with (folder / "base.cpio").open("wb") as out:
        cpio.pack(root, out)
    for name in ("apt", "deb", "kernel"):
        shutil.rmtree(folder / name)


def _is_unused(deb: Path) -> bool:
    return deb.name.partition("_")[0] in _UNUSED_PACKAGES


def _strip(root: Path, *, thorough: bool) -> None:
    """Delete what a guest never reads; not the libraries of unknown packages."""
    kept = {name: (root / name).read_bytes() for name in _READ}
    for pattern in _UNREAD:
        for path in list(root.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for name, content in kept.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    if thorough:
        keep_needed_libraries(root)


def _add_modules(source: Path, root: Path) -> None:
    """Copy the modules that a guest may want, unpacked, with all that they need."""
    dest = root / "usr/lib/modules" / source.name
    (dest / "kernel").mkdir(parents=True)
    for index in source.glob("modules.builtin*"):
        shutil.copy(index, dest)
    shutil.copy(source / "modules.order", dest)
    depmod = program(root, "depmod")
    if not (source / "modules.dep").exists():
        run([*depmod, "-b", str(source.parents[3] / "usr"), source.name])
    needs = {}
    for line in (source / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[_module_name(path)] = [path, *others.split()]
    for name in MODULES:
        for path in needs.get(_module_name(name), ()):  # absent: built in, or not there
            packed = (source / path).read_bytes()
            plain = lzma.decompress(packed) if path.endswith(".xz") else packed
            name_there = Path(path).name.removesuffix(".xz")
            (dest / "kernel" / name_there).write_bytes(plain)
    run([*depmod, "-b", str(root / "usr"), source.name])


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")


def _finish(root: Path) -> None:
    compile_python(root, [root / "usr/lib" / PYTHON, root / SITE], keep_source=False)
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in _FILES.items():
        (root / name).write_text(text)


def compile_python(
    root: Path, folders: Iterable[Path], *, keep_source: bool, home: Path | None = None
) -> None:
    """Byte-compile with the Python of `root`, for use below `home` (`root` itself).

    Without its source a module is half as large; a traceback then shows no lines of it.
    """
    words = [str(folder) for folder in folders]
    legacy = [] if keep_source else ["-b"]
    python = [*program(root, PYTHON), "-S", "-m", "compileall", "-q", *legacy]
    options = [
        "--invalidation-mode",
        "unchecked-hash",
        "-s",
        str(home or root),
        "-p",
        "/",
    ]
    # Status 1 tells of files that are no Python (templates); they stay as they are.
    subprocess.run(
        [*python, *options, *words],
        env={"PYTHONHOME": str(root / "usr")},
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    if not keep_source:
        for folder in map(Path, words):
            for source in folder.rglob("*.py"):
                if source.with_suffix(".pyc").exists():
                    source.unlink()


def _install(requirements: Sequence[str], target: Path) -> None:
    """Put packages there by pip, for the guest's Python, whatever Python runs here."""
    options = ["--quiet", "--no-compile", "--disable-pip-version-check", "--no-input"]
    options += ["--root-user-action=ignore", "--upgrade", "--target", str(target)]
    options += ["--python-version", PYTHON.removeprefix("python"), "--implementation"]
    options += ["cp", "--only-binary=:all:"]
    options += [word for name in _PLATFORMS for word in ("--platform", name)]
    try:
        run([*_pip(), "install", *options, *requirements])
    except UnavailableError as error:
        raise UnavailableError(
            f"Python packages for the guest cannot be had: {error}"
        ) from None


def _pip() -> list[str]:
    """Give the words that start pip: this Python's, or the one it could install."""
    own = _own_pip()
    if subprocess.run([*own, "--version"], check=False, capture_output=True).returncode:
        wheels = list(_bundled().glob("pip-*.whl"))
        if not wheels:
            raise UnavailableError(f"{sys.executable} has no pip: install it")
        return [sys.executable, str(wheels[0] / "pip")]
    return own


def _own_pip() -> list[str]:
    return [sys.executable, "-m", "pip"]


def _bundled() -> Path:
    """Give where Python keeps the pip for new environments; Debian has it elsewhere."""
    spec = importlib.util.find_spec("ensurepip")
    if spec is None or spec.origin is None:
        return Path("/usr/share/python-wheels")
    own = Path(spec.origin).parent / "_bundled"
    return own if own.is_dir() else Path("/usr/share/python-wheels")
