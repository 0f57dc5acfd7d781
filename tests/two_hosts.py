"""Two network namespaces that stand for two hosts, and a link between them that can be slow."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADER = 0x1001


class Hosts:
    """`names[0]` has ADDRESSES[0], `names[1]` the other."""

    def __init__(self, names: tuple[str, str], devices: tuple[str, str]) -> None:
        self.names, self.devices = names, devices
        self.delay = 0.0
        """Seconds that a packet takes from one to the other, where the link can be slow."""

    def command(self, host: int, *command: str) -> list[str]:
        """A command line that runs on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def set_link(self, host: int, state: str) -> None:
        """Set a host's end of the link `up` or `down`."""
        _ip("-n", self.names[host], "link", "set", self.devices[host], state)


@contextlib.contextmanager
def veth_hosts() -> Iterator[Hosts]:
    """Two hosts on a veth pair. Skips the test where that is not permitted."""
    with _namespaces("v") as hosts:
        first, second = hosts.devices
        with _or_skip():
            _ip("link", "add", first, "netns", hosts.names[0], "type", "veth", "peer", second, "netns", hosts.names[1])
            _address(hosts)
        yield hosts


@contextlib.contextmanager
def slow_hosts() -> Iterator[Hosts]:
    """Two hosts on TUN devices, between which this process carries packets, after `delay`. Skips as `veth_hosts`."""
    with _namespaces("t") as hosts, contextlib.ExitStack() as stack:
        ends = []
        with _or_skip():
            for name, device in zip(hosts.names, hosts.devices, strict=True):
                ends.append(_tun(device))
                stack.callback(os.close, ends[-1])
                _ip("link", "set", device, "netns", name)
            _address(hosts)
        over = threading.Event()
        carrier = threading.Thread(target=_carry, args=(hosts, ends, over), daemon=True)
        carrier.start()
        stack.callback(carrier.join)
        stack.callback(over.set)
        yield hosts


@contextlib.contextmanager
def _namespaces(kind: str) -> Iterator[Hosts]:
    names = (f"gossamer-{kind}-{os.getpid()}-a", f"gossamer-{kind}-{os.getpid()}-b")
    try:
        with _or_skip():
            for name in names:
                _ip("netns", "add", name)
        yield Hosts(names, (f"g{kind}a", f"g{kind}b"))
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextlib.contextmanager
def _or_skip() -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be had: {getattr(error, 'stderr', '') or error}")


def _address(hosts: Hosts) -> None:
    """Give each host its address, and bring up its devices."""
    for name, device, own, other in zip(hosts.names, hosts.devices, ADDRESSES, reversed(ADDRESSES), strict=True):
        _ip("-n", name, "addr", "add", own, "peer", other, "dev", device)
        _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "link", "set", "lo", "up")


def _carry(hosts: Hosts, ends: list[int], over: threading.Event) -> None:
    """Hand packets from each end to the other, each after the delay that held when it came."""
    waiting: deque[tuple[float, int, bytes]] = deque()
    while not over.is_set():
        rest = waiting[0][0] - time.monotonic() if waiting else 0.1
        for end in select.select(ends, [], [], max(0.0, min(rest, 0.1)))[0]:
            packet = os.read(end, 1 << 16)
            waiting.append((time.monotonic() + hosts.delay, ends[1 - ends.index(end)], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, packet = waiting.popleft()
            with contextlib.suppress(OSError):  # that end of the link is down
                os.write(end, packet)


def _tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH14x", name.encode(), _IFF_TUN_WITHOUT_HEADER))
    return device


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
