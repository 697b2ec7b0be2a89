"""The compiled cores: one limited-API extension per package, over plain C11 headers."""

from setuptools import Extension, setup

INCLUDE = ["shm/include", "ioq/include", "vbus/net/include"]
HEADERS = {
    "shm": ["shm/include/shm/space.h", "shm/include/shm/signal.h"],
    "ioq": ["ioq/include/ioq/ring.h"],
    "net": ["vbus/net/include/net/venet.h"],
}


def core(package: str, *uses: str) -> Extension:
    return Extension(
        f"{package}._core",
        [f"{package.replace('.', '/')}/_core.c"],
        include_dirs=INCLUDE,
        depends=[header for use in uses for header in HEADERS[use]],
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-cast-function-type"],
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
    )


setup(
    ext_modules=[
        core("shm", "shm"),
        core("ioq", "shm", "ioq"),
        core("vbus.net", "shm", "ioq", "net"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
