"""Ethernet of a virtual machine: venet beside QEMU's own virtio-net-pci.

Both are in the same machine and are measured one right after the other: venet through
`vbus guest run` in the guest and `vbus serve` on the host, virtio-net by the guest's
kernel and QEMU. Each leads to a TAP on the host.
"""

import json
import shutil
import subprocess

from bench.harness import Metric, Round, Suite, Target
from bench.lab import enter
from bench.processes import Skipped
from vbus.errors import VbusError
from vbus.vm import image, qemu

_TIMEOUT_S = 150

_KINDS = {"vbus": "venet (VFIO)", "qemu": "virtio-net-pci of QEMU"}
_FIGURES = {
    "out": Metric("TCP guest to host", "Gbit/s"),
    "in": Metric("TCP host to guest", "Gbit/s"),
    "ping": Metric("ping guest to host, mean", "us"),
}


def _measure() -> Round:
    if shutil.which("iperf3") is None:
        raise Skipped("needs iperf3: apt-get install iperf3")
    try:  # outside of the namespaces, which lead nowhere
        qemu.fetch()
        image.cached()
    except (VbusError, OSError) as error:
        raise Skipped(f"needs a virtual machine: {error}") from error
    done = subprocess.run(
        enter("machine_worker"),
        check=True,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        timeout=_TIMEOUT_S,
    )
    result: Round = json.loads(done.stdout)
    return result


SUITES = (
    Suite(
        "machine",
        {
            f"{kind}_{figure}": Metric(f"{metric.label}: {label}", metric.unit)
            for figure, metric in _FIGURES.items()
            for kind, label in _KINDS.items()
        }
        | {"boot": Metric("boot to the guest's agent", "s")},
        (
            Target("VM: TCP out / virtio-net-pci", "vbus_out", 0.5, "qemu_out"),
            Target("VM: TCP in / virtio-net-pci", "vbus_in", 0.5, "qemu_in"),
        ),
        _measure,
    ),
)
