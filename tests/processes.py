"""What the real servers of the tests have in common: ports of loopback, and an end with the tests' own process."""

import ctypes
import random
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, and that no outgoing connection is given while a server restarts."""
    with ExitStack() as held:
        ports: list[int] = []
        for port in random.SystemRandom().sample(range(12_000, 32_000), 1000):
            taken = held.enter_context(socket.socket())
            with suppress(OSError):
                taken.bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise AssertionError(f"no {count} ports are free")


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """In a child: have the kernel send it `number` when its parent ends: killed tests leave no server behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def descendants(pid: int) -> list[int]:
    """Processes that `pid` has started, and those that they have, as far as these still have their parents."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended in between
            parent = int(place.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(place.parent.name))
    found, behind = [], [pid]
    while behind:
        children = parents.get(behind.pop(), [])
        found += children
        behind += children
    return found
