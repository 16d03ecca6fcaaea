"""Where a server listens: host and port with or without TLS, or a Unix socket.

vLLM's process writes this down as vLLM has parsed its flags, and the process that started it asks there whether the server answers.
Open this file if a server that is up is not seen.
"""

import hashlib
import json
import os
import socket
import ssl
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from sku_vllm.client.http import http_client, trusting_nobody, unverified
from sku_vllm.client.socket_path import reachable
from sku_vllm.errors import ConfigError
from sku_vllm.output import write_text
from sku_vllm.serving.arms import ALIAS, Arm
from sku_vllm.serving.serve_config import VARIABLE

LISTENING = ".listening"  # appended to the configuration's path: the file that holds the address
ANYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # what listens on every address also listens on this one


@dataclass(frozen=True, slots=True)
class Address:
    """Where one server listens. uds: path of a Unix socket, which then takes the place of host and port.

    shutdown: seconds that vLLM gives running requests after SIGTERM (its --shutdown-timeout). alias: the first model name of its clients.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls: bool = False
    uds: str | None = None
    shutdown: float = 0.0
    alias: str = ALIAS

    @property
    def root(self) -> str:
        """The URL without a path; of a Unix socket `unix:PATH`, as `sku ctl --server` takes it."""
        if self.uds:
            return f"unix:{self.uds}"
        host = ANYWHERE.get(self.host, self.host)
        return f"http{'s' * self.tls}://{f'[{host}]' if ':' in host else host}:{self.port}"

    def client(self, timeout: float = 30) -> httpx.Client:
        """A client for this server. It never uses a proxy and does not check the certificate: this machine's own server is asked."""
        base = "http://localhost" if self.uds else self.root
        return http_client(timeout=timeout, uds=self.uds, trust=unverified() if self.tls else trusting_nobody(), base=base)

    def answers(self, timeout: float = 5.0) -> bool:
        """Whether a server answers here: with any HTTP status below 500, or by asking for a certificate that this client does not have."""
        shaken = False  # whether TLS is spoken there: a server that wants a certificate may close the connection after that, without a word
        try:
            with self._connected(timeout) as plain:
                stream = unverified().wrap_socket(plain) if self.tls else plain
                shaken = self.tls
                stream.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                status = stream.recv(64).split()[1:2]
        except TimeoutError:
            return False
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return shaken
        except ssl.SSLError:
            return True
        except OSError:
            return shaken
        return not status[0].startswith(b"5") if status else shaken

    def _connected(self, timeout: float) -> socket.socket:
        if not self.uds:
            return socket.create_connection((ANYWHERE.get(self.host, self.host), self.port), timeout)
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(timeout)
        try:
            stream.connect(reachable(self.uds))
        except OSError:
            stream.close()
            raise
        return stream


def address_of(args: Namespace) -> Address:
    """The address in vLLM's parsed flags."""
    tls = bool(getattr(args, "ssl_keyfile", None) or getattr(args, "ssl_certfile", None))
    uds = getattr(args, "uds", None)
    shutdown = float(getattr(args, "shutdown_timeout", 0) or 0)
    names = getattr(args, "served_model_name", None) or [ALIAS]
    return Address(args.host or "", args.port, tls, os.path.abspath(uds) if uds else None, shutdown, names[0])


def write_address(args: Namespace) -> None:
    """Write the address beside the file that SKU_SERVE_CONFIG names, for the process that started this one."""
    write_text(Path(os.environ[VARIABLE] + LISTENING), json.dumps(asdict(address_of(args))), mode=0o600)


def read_address(run: Path) -> Address | None:
    """The address that a server with this private directory has written; None before it has parsed its flags."""
    try:
        return Address(**json.loads((run / ("serve.yaml" + LISTENING)).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def mark_of(args: Namespace) -> str:
    """Names a server, the same in all its processes, in the requests that it sends on to upstream arms."""
    where = f"{socket.gethostname()} {args.host} {args.port} {getattr(args, 'uds', None)}"
    return hashlib.sha256(where.encode()).hexdigest()[:12]


def points_here(url: str, host: str, port: int) -> bool:
    """Whether a URL leads to the server that listens on this host and port: by the port, and an address that is this machine's own."""
    parts = urlsplit(url)
    if (parts.port or (443 if parts.scheme == "https" else 80)) != port:
        return False
    try:
        named = {each[4][0] for each in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)}
        ours = {each[4][0] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)} if host not in ANYWHERE else None
    except OSError:
        return False
    return bool(named & ours) if ours else any(map(_local, named))


def _local(address: object) -> bool:
    """Whether an IP address belongs to this machine: only then a socket can be bound to it."""
    with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def check_not_itself(arm: Arm, args: Namespace) -> None:
    """Refuse an upstream arm that is the very server with these flags; one on a Unix socket has no URL that could lead to it.

    Raises:
        ConfigError: its URL leads here.
    """
    if arm.kind == "upstream" and not getattr(args, "uds", None) and points_here(arm.source, args.host or "", args.port):
        raise ConfigError(f"--arm {arm.name}={arm.spec}: is this server itself, which would ask itself for ever; name another server")
