"""The compiled cores: one limited-API extension per package, over plain C11 headers."""

from glob import glob

from setuptools import Extension, setup

FOLDERS = {
    "shm": "shm",
    "ioq": "ioq",
    "vbus.net": "vbus/net",
    "backends.virtio": "backends/virtio",
    "proxy.virtio": "proxy/virtio",
}


def core(package: str, *below: str) -> Extension:
    """Give the extension of a package that builds on the cores `below` it."""
    folders = [FOLDERS[name] for name in (package, *below)]
    parts = glob(f"{folders[0]}/*.inc")
    for folder in folders:
        parts += glob(f"{folder}/include/*/*.h")
    return Extension(
        f"{package}._core",
        [f"{folders[0]}/_core.c"],
        include_dirs=[f"{folder}/include" for folder in folders],
        depends=parts,
        extra_compile_args=[
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Wno-cast-function-type",
        ],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
    )


setup(
    ext_modules=[
        core("shm"),
        core("ioq", "shm"),
        core("vbus.net", "shm", "ioq"),
        core("backends.virtio", "shm"),
        core("proxy.virtio", "backends.virtio", "shm"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
