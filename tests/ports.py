"""Ports for what binds its own late."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Below those that the kernel hands out to whoever asks for any, such as every new worker of Ray."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.sample(range(20_000, 32_000), 500):
            if len(found) == count:
                break
            with contextlib.suppress(OSError):  # taken
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found
