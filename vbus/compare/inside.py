"""What is run inside a virtual machine that is measured: each function travels as text.

So each stands on its own and imports what it uses. Interfaces are named by their MAC
address, which the host chose, whatever driver made them.
"""

from typing import Any


def set_up(cards: list[list[str]], within_s: float) -> list[str]:
    """Give interfaces (MAC, address with prefix) their addresses; give their names.

    Each answers ARP for itself only: they are all on one network.
    """
    import subprocess
    import time
    from pathlib import Path

    for name, value in (("arp_ignore", "1"), ("arp_announce", "2"), ("rp_filter", "0")):
        Path(f"/proc/sys/net/ipv4/conf/all/{name}").write_text(value)
    end = time.monotonic() + within_s
    while True:
        paths = Path("/sys/class/net").glob("*/address")
        names = {path.read_text().strip(): path.parent.name for path in paths}
        if all(mac in names for mac, _ in cards):
            break
        if time.monotonic() > end:
            there = sum(mac in names for mac, _ in cards)
            raise TimeoutError(f"{there} of {len(cards)} interfaces came")
        time.sleep(0.02)
    lines = [f"addr add {at} dev {names[mac]}" for mac, at in cards]
    lines += [f"link set {names[mac]} up" for mac, _ in cards]
    subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(lines) + "\n", check=True, text=True
    )
    return [names[mac] for mac, _ in cards]


def appears(mac: str, within_s: float) -> None:
    """Wait until there is an interface with this address."""
    import time
    from pathlib import Path

    end = time.monotonic() + within_s
    while True:
        for path in Path("/sys/class/net").glob("*/address"):
            try:
                if path.read_text().strip() == mac:
                    return
            except OSError:
                continue  # it has gone meanwhile
        if time.monotonic() > end:
            raise TimeoutError(f"no interface with the address {mac}")
        time.sleep(0.002)


def drivers(least: int, within_s: float) -> None:
    """Wait until so many functions of ours have a driver that is ready."""
    import time
    from pathlib import Path

    end = time.monotonic() + within_s
    ready = 0
    while ready < least:
        if time.monotonic() > end:
            raise TimeoutError(f"{ready} of {least} functions got a driver")
        ready = 0
        for path in Path("/sys/bus/pci/devices").glob("*/virtio*/status"):
            ours = (path.parents[1] / "revision").read_text().strip() == "0x01"
            ready += ours and bool(int(path.read_text(), 16) & 4)
        time.sleep(0.02)


def interrupts() -> dict[str, int]:
    """Count what the host's functions have: vectors, functions on a shared line, and
    interrupts so far."""
    from pathlib import Path

    irqs, shared, bound = set(), 0, 0
    for path in Path("/sys/bus/pci/devices").iterdir():
        vendor = (path / "vendor").read_text().strip()
        revision = (path / "revision").read_text().strip()
        if vendor != "0x11da" and (vendor, revision) != ("0x1af4", "0x01"):
            continue
        if not (path / "driver").exists():
            continue
        bound += 1
        own = {one.name for one in (path / "msi_irqs").glob("*")}
        if not own:
            shared += 1
            own = {(path / "irq").read_text().strip()}
        irqs |= own
    vectors = total = 0
    for line in Path("/proc/interrupts").read_text().splitlines()[1:]:
        number, _, rest = line.partition(":")
        if number.strip() in irqs:
            words = rest.split()
            counts = [word for word in words if word.isdigit()]
            total += sum(map(int, counts[: len(words)]))
            vectors += "MSI" in rest
    return {"functions": bound, "vectors": vectors, "shared": shared, "total": total}


def trips(name: str, host: str, port: int, count: int, most_s: float) -> list[float]:
    """Send a small frame and wait for its answer, again and again; microseconds.

    Fewer than `count`, but one, if those take longer than `most_s`.
    """
    import socket
    import time

    times: list[float] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        one.connect((host, port))
        one.settimeout(1)
        lost, end = 0, time.perf_counter() + most_s
        while len(times) < count and not (times and time.perf_counter() > end):
            began = time.perf_counter()
            one.send(bytes(48))
            try:
                one.recv(64)
            except TimeoutError:
                lost += 1
                if lost > 5:
                    raise
                continue
            times.append((time.perf_counter() - began) * 1e6)
    return times


def load(
    names: list[str], host: str, port: int, in_flight: int, count: int, most_s: float
) -> dict[str, float]:
    """Have so many small frames under way, spread over the interfaces.

    Until `count` were answered, or for `most_s` and one was. Gives the answers that
    came, the seconds that took and how many were lost.
    """
    import select
    import socket
    import time

    sockets: dict[int, Any] = {}
    for name in names[:in_flight]:
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        one.connect((host, port))
        one.setblocking(False)
        sockets[one.fileno()] = one
    window = in_flight // len(sockets)
    poll = select.poll()
    for fd, one in sockets.items():
        poll.register(fd, select.POLLIN)
        for _ in range(window):
            one.send(bytes(48))
    answers = lost = 0
    began = time.perf_counter()
    while answers < count and not (answers and time.perf_counter() - began > most_s):
        ready = poll.poll(1000)
        if not ready:  # all that was under way is lost: begin again
            lost += in_flight
            if lost > 5 * in_flight:
                raise TimeoutError("no answers come any more")
            for one in sockets.values():
                for _ in range(window):
                    one.send(bytes(48))
        for fd, _ in ready:
            one = sockets[fd]
            while True:
                try:
                    one.recv(64)
                except BlockingIOError:
                    break
                answers += 1
                one.send(bytes(48))
    seconds = time.perf_counter() - began
    for one in sockets.values():
        one.close()
    return {"answers": answers, "seconds": seconds, "lost": lost}


def push(name: str, host: str, port: int, seconds: float) -> float:
    """Send TCP for so long; give the bits a second that the host has received."""
    import socket
    import time

    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        one.settimeout(20)
        one.connect((host, port))
        data = bytes(1 << 18)
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        received = int(one.recv(64))
        return 8 * received / (time.perf_counter() - began)


def pull(name: str, host: str, port: int, seconds: float) -> float:
    """Receive TCP for so long; give bits a second."""
    import socket
    import time

    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
        one.settimeout(20)
        one.connect((host, port))
        buffer = bytearray(1 << 18)
        received, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            received += one.recv_into(buffer)
        return 8 * received / (time.perf_counter() - began)
