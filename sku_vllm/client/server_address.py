"""How `--server` names a running server: a URL, or a Unix socket; and which certificate it may show.

Open this file to change how commands reach a server of one's own.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx

from sku_vllm.client.http import http_client, trusting_nobody, unverified
from sku_vllm.client.url import http_url
from sku_vllm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """One server. text: as the user wrote it. base: the URL in front of every path. uds: its Unix socket, where it has one."""

    text: str
    base: str
    uds: str | None = None
    trust: ssl.SSLContext | None = None

    def client(self, timeout: float) -> httpx.Client:
        """A client for this server. It uses no proxy: a server of one's own is asked where it is."""
        trust = trusting_nobody() if self.base.startswith("http:") else self.trust
        return http_client(timeout=timeout, uds=self.uds, trust=trust, base=self.base)


def server_address(text: str, trust: ssl.SSLContext | None = None, flag: str = "--server") -> ServerAddress:
    """`http://HOST:PORT`, `https://…` (a trailing /v1 is ignored) or `unix:PATH`.

    Raises:
        ConfigError: another form.
    """
    if text.startswith("unix:"):
        path = "/" + text.removeprefix("unix:").lstrip("/") if text.startswith("unix:/") else text.removeprefix("unix:")
        if not path:
            raise ConfigError(f"{flag} {text}: which socket? write unix:PATH")
        return ServerAddress(text, "http://localhost", path, trust)
    if not http_url(text):
        raise ConfigError(f"{flag} {text}: expected a URL that begins with http:// or https://, or unix:PATH")
    return ServerAddress(text, text.rstrip("/").removesuffix("/v1"), None, trust)


def trusting(cacert: str | None, cert: str | None, insecure: bool) -> ssl.SSLContext | None:
    """Which certificates to accept, and which to show; None for what this machine trusts.

    Args:
        cacert: PEM file of a certificate authority, or of a self-signed server. cert: PEM file with a client's certificate and key.
        insecure: accept any certificate.

    Raises:
        ConfigError: a file that cannot be used, or both `cacert` and `insecure`.
    """
    if insecure and cacert:
        raise ConfigError("--insecure: with --cacert the certificate is checked; give one of the two")
    if not (cacert or cert or insecure):
        return None
    context = ssl.create_default_context() if cert or not insecure else unverified()
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for flag, file, load in (("--cacert", cacert, context.load_verify_locations), ("--cert", cert, context.load_cert_chain)):
        try:
            if file:
                load(str(Path(file)))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{flag} {file}: {error}; give a PEM file") from error
    return context
