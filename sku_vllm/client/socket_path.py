"""Paths of Unix sockets, which the system limits in length. Without httpx, since every process of a server reads this."""

import os

SOCKET_PATH = 107  # bytes at most


def reachable(socket: str) -> str:
    """A Unix socket's path as this process can name it: from its working directory where the whole path is too long for a socket's."""
    return socket if len(os.fsencode(socket)) <= SOCKET_PATH else os.path.relpath(socket)
