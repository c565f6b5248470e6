"""Free ports, each given out once, so that programs that start at the same time never meet on one."""

import contextlib
import fcntl
import os
import socket
import tempfile
from pathlib import Path

# Below the ports that Linux assigns to connections (32768 and up) and srun's rendezvous (20000 and up).
LOWEST, COUNT = 11000, 9000
COUNTER = Path(tempfile.gettempdir()) / f"iddpm-test-ports-{os.getuid()}"


def free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens; all tests on this machine count through the range together."""
    ports: list[int] = []
    with COUNTER.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        offset = int(file.read() or 0)
        while len(ports) < count:
            offset = (offset + 1) % COUNT
            if is_free(LOWEST + offset):
                ports.append(LOWEST + offset)
        file.truncate(0)
        file.write(str(offset))
    return ports


def free_port() -> int:
    return free_ports(1)[0]


def is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as server:
        server.bind(("", port))
        return True
    return False
