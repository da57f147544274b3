"""Where a process and those that it started listen, as the kernel says."""

import ipaddress
from contextlib import suppress
from pathlib import Path

from tests.processes import descendants

LISTEN = "0A"  # a socket's state in /proc/net/tcp


def listening_addresses(pid: int) -> set[str]:
    """Addresses, without ports, of every TCP socket that a process, or one below it, listens on."""
    held = set()
    for each in (pid, *descendants(pid)):
        with suppress(FileNotFoundError, ProcessLookupError):
            for handle in Path(f"/proc/{each}/fd").iterdir():
                with suppress(FileNotFoundError):
                    held.add(str(handle.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTEN and f"socket:[{inode}]" in held:
                found.add(_address(local.partition(":")[0]))
    return found


def _address(text: str) -> str:
    """Words of four bytes, each in the machine's order."""
    data = bytes.fromhex(text)
    return str(ipaddress.ip_address(b"".join(data[k : k + 4][::-1] for k in range(0, len(data), 4))))
