"""The control API of one running server, as `sku ctl` and `sku chat` call it; its refusals become errors that say which flag to give."""

import json
from typing import Any

from sku_vllm.client.http import ServerRefused, fetch_json
from sku_vllm.client.server_address import ServerAddress
from sku_vllm.errors import ConfigError, NegativeResult, RunError


class ControlClient:
    """Calls routes below /v1/sku/. name: the server as the user wrote it."""

    def __init__(self, address: ServerAddress, token: str | None, api_key: str | None, timeout: float) -> None:
        self.address, self.timeout, self.name = address, timeout, address.text
        self.headers = {**({"X-SKU-Token": token} if token else {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})}

    def call(self, method: str, path: str, body: Any = None, dry_run: bool = False) -> Any:
        """The server's JSON answer to one request.

        Raises:
            ConfigError: the server refused what was asked (4xx). RunError: it could not be reached, or failed.
            NegativeResult: `ready`, and it is not.
        """
        url = f"/v1/sku/{path}{'?dry_run=true' if dry_run else ''}"
        where = f"{self.address.text.rstrip('/').removesuffix('/v1')}{url}"
        try:
            with self.address.client(self.timeout) as client:
                return fetch_json(url, method=method, body=body, headers=self.headers, client=client)
        except ServerRefused as error:
            message = said(error.body)
            if error.status == 503 and path == "ready":
                raise NegativeResult(message) from error
            kind = RunError if error.status >= 500 else ConfigError
            raise kind(f"{where}: {error.status}: {message}{hint(error.status, message)}") from error
        except ValueError as error:
            raise RunError(f"{where}: {error}; is the server up, and is --server right?") from error
        except RunError as error:
            raise RunError(f"{error}{tls_hint(str(error), self.address)}") from error


def said(body: str) -> str:
    """The message in an error response: vLLM's or this package's error object, else its beginning."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:500]


def hint(status: int, message: str) -> str:
    """Which flag a 401 is about: this package's token, or vLLM's key."""
    if status != 401:
        return ""
    return "; set --token or SKU_TOKEN" if "X-SKU-Token" in message else "; set --api-key or OPENAI_API_KEY to the server's --api-key"


def tls_hint(message: str, address: ServerAddress) -> str:
    """Which flag helps where a connection fails over its certificate, or for want of TLS."""
    if "CERTIFICATE_VERIFY_FAILED" in message:
        return "; give its certificate with --cacert, or accept any with --insecure"
    if "certificate required" in message.lower() or "CERTIFICATE_REQUIRED" in message:
        return "; it wants a client's certificate: --cert"
    plain = address.base.startswith("http:") and not address.uds
    cut = "disconnected without" in message or "reset by peer" in message
    return "; if it serves TLS, its URL begins with https://" if plain and cut else ""
