"""Who may use the control API: --token and --operator may change the server, --reader may only look.

Secrets of operators and readers are read from environment variables, so that they are in no command line and no file.
"""

import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sku_vllm.errors import ConfigError

LEAST = 8  # characters of a secret
PAIR = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,47})=([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a token. name: as the audit log writes it. changes: whether the token may change anything."""

    name: str
    changes: bool


class Tokens:
    """The tokens of one server, by secret."""

    def __init__(self, token: str | None, operators: dict[str, str], readers: dict[str, str]) -> None:
        self.secrets: list[tuple[str, Holder]] = [(token, Holder("token", True))] if token else []
        self.secrets += [(secret, Holder(name, True)) for name, secret in operators.items()]
        self.secrets += [(secret, Holder(name, False)) for name, secret in readers.items()]

    def holder(self, token: str | None) -> Holder | None:
        """Whose token this is; None for nobody's. Every secret is compared, in constant time."""
        found = [holder for secret, holder in self.secrets if hmac.compare_digest((token or "").encode(), secret.encode())]
        return found[0] if found else None


def secrets_of(flag: str, pairs: Sequence[str], least: int = LEAST) -> dict[str, str]:
    """{name: secret} of NAME=VARIABLE pairs.

    Raises:
        ConfigError: another form, a name twice, a variable that is not set, or a secret shorter than `least` characters.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        match = PAIR.fullmatch(pair)
        if not match or match[1] in found:
            raise ConfigError(f"--{flag} {pair}: write each name once, as NAME=VARIABLE, an environment variable with its secret")
        secret = os.environ.get(match[2], "")
        if len(secret) < least:
            problem = f"holds fewer than {least} characters" if secret else "is not set"
            raise ConfigError(f"--{flag} {pair}: the environment variable {match[2]} {problem}")
        found[match[1]] = secret
    return found
