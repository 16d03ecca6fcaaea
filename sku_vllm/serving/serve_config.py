"""The settings of one server: the flags of `sku serve`, or the same keys in the YAML file that SKU_SERVE_CONFIG names.

Open this file to add a setting; `cli/serve.py` has the flag for it.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.serving.arms import Arm, parse_arms, parse_split, scale_looked_up
from sku_vllm.serving.tokens import LEAST, Tokens, secrets_of

VARIABLE = "SKU_SERVE_CONFIG"


@dataclass(slots=True)
class ServeConfig:
    """One server's arms, judge and rules. They are validated here; adapters and judge are not opened.

    arms: NAME=SPEC as on the command line; `ADAPTER@tuned` is replaced by the scale that sku tune chose.
    split: NAME=WEIGHT,… summing to 1. judge_sample: share of answers judged.
    judge_queue: answers that may wait for the judge; more are dropped and counted. shadow: ARM=SHARE, the share of requests that
    ARM answers a second time for judging only. rollback_if: a rule such as "harmful>0.05 after 200". state: a directory that is
    kept after the server ends. adapter_root: trusted clients may name NAME@SCALE for an adapter directly below it.
    alias: the model names that clients use; none: vLLM's --served-model-name, or `sku`. sticky_cache_key: take `prompt_cache_key` as a
    sticky key too. upstream_key: ARM=VARIABLE, the environment variable with the key that an upstream arm's server wants.
    operators, readers: NAME=VARIABLE, further control tokens, which may change the server or only look at it.
    audit: the file that every control action is appended to; with `state` it has one anyway. follow: a YAML file with arms and split that
    this server follows, such as a ConfigMap.
    run: the private directory of the arms' adapters and, without `state`, of the routing table.

    Raises:
        ConfigError: an invalid setting, or `@tuned` for an adapter without a result of sku tune.
    """

    model: str = ""
    arms: list[str] = field(default_factory=list)
    split: str | None = None
    judge: str | None = None
    judge_sample: float = 1.0
    judge_queue: int = 1024
    expose_arms: bool = False
    token: str | None = None
    blind: bool = False
    shadow: str | None = None
    rollback_if: str | None = None
    drift: bool = False
    keep_judged: str | None = None
    revision: str | None = None
    state: str | None = None
    reset_state: bool = False
    any_base: bool = False
    adapter_root: str | None = None
    run: str | None = None
    alias: list[str] = field(default_factory=list)
    sticky_cache_key: bool = False
    upstream_key: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    audit: str | None = None
    follow: str | None = None

    def __post_init__(self) -> None:
        if self.follow is not None:
            self._followed()
        named = (each.partition("=") for each in self.arms)
        self.arms = [name + equals + scale_looked_up(spec, f"--arm {name}={spec}") for name, equals, spec in named]
        arms = self.parsed_arms()
        parse_split(self.split, list(arms))
        if not 0 <= self.judge_sample <= 1:
            raise ConfigError(f"--judge-sample {self.judge_sample}: a share between 0 and 1")
        if self.judge_queue < 1:
            raise ConfigError(f"--judge-queue {self.judge_queue}: at least 1")
        if self.token is not None and len(self.token) < LEAST:
            raise ConfigError(f"--token: at least {LEAST} characters, for instance from `openssl rand -hex 16`")
        self.alias = [self.alias] if isinstance(self.alias, str) else list(self.alias)
        self.tokens()
        for name in self.upstream_secrets():
            if name in arms and arms[name].kind != "upstream":
                raise ConfigError(f"--upstream-key {name}: the arm {name!r} is on this server, which needs no key")
        if self.shadow is not None:
            self.parsed_shadow()
        if self.rollback_if is not None:
            from sku_vllm.serving.rollback import parse_rule

            parse_rule(self.rollback_if)
        if self.adapter_root is not None and not Path(self.adapter_root).is_dir():
            raise ConfigError(f"--adapter-root {self.adapter_root}: no such directory")
        for flag in ("rollback_if", "drift", "keep_judged"):
            if getattr(self, flag) and not self.judge:
                raise ConfigError(f"--{flag.replace('_', '-')}: needs --judge, whose verdicts it works on")

    def _followed(self) -> None:
        """Begin with the arms and the split of the file that is followed."""
        from sku_vllm.serving.followed_file import read_wanted

        if self.arms or self.split:
            raise ConfigError(f"--follow {self.follow}: the file says what arms there are; leave --arm and --split out")
        wanted = read_wanted(Path(str(self.follow)))
        self.arms = [f"{name}={spec}" for name, spec in wanted.arms.items()]
        self.split = ",".join(f"{name}={weight}" for name, weight in wanted.split.items())

    def parsed_arms(self) -> dict[str, Arm]:
        """The arms by name, in the order given."""
        return parse_arms(self.arms)

    def parsed_split(self) -> dict[str, float]:
        """Weights by arm; they sum to 1."""
        return parse_split(self.split, list(self.parsed_arms()))

    def parsed_shadow(self) -> tuple[str, float]:
        """(arm, share) of `--shadow ARM=SHARE`."""
        name, _, share = (self.shadow or "").partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if name not in self.parsed_arms() or not 0 < value <= 1:
            raise ConfigError(f"--shadow {self.shadow}: write ARM=SHARE with one of the arms and a share in (0, 1]")
        return name, value

    def tokens(self) -> Tokens:
        """Who may use the control API. Raises ConfigError for a variable that is not set or a secret that is too short."""
        return Tokens(self.token, secrets_of("operator", self.operators), secrets_of("reader", self.readers))

    def upstream_secrets(self) -> dict[str, str]:
        """{arm: key that its server wants}. Raises ConfigError for a variable that is not set."""
        return secrets_of("upstream-key", self.upstream_key, least=1)

    def dump(self, path: Path) -> None:
        """Write the YAML that SKU_SERVE_CONFIG can name; 0600, since it may hold the control token."""
        import yaml

        from sku_vllm.output import write_text

        values = dataclasses.asdict(self) | ({"arms": [], "split": None} if self.follow else {})  # which the file says
        write_text(path, yaml.safe_dump(values, sort_keys=False), mode=0o600)


def read_config(path: str | Path | None = None) -> ServeConfig:
    """The configuration in `path`, or in the file that SKU_SERVE_CONFIG names.

    Raises:
        ConfigError: no such variable or file, not YAML, an unknown key, or a value `ServeConfig` refuses.
    """
    import yaml

    path = path or os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(f"{VARIABLE} is not set: name the YAML file with this server's arms, or start it with `sku serve`")
    try:
        values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{VARIABLE}={path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{VARIABLE}={path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{VARIABLE}={path}: expected one `key: value` per line")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = [each.name for each in dataclasses.fields(ServeConfig)]
    for key in values:
        if key not in known:
            import difflib

            close = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{VARIABLE}={path}: unknown key {key!r}{f'; did you mean {close[0]!r}?' if close else ''}")
    arms = values.get("arms", [])
    if isinstance(arms, dict):
        values["arms"] = [f"{name}={spec}" for name, spec in arms.items()]
    split = values.get("split")
    if isinstance(split, dict):
        values["split"] = ",".join(f"{name}={weight}" for name, weight in split.items())
    try:
        return ServeConfig(**values)
    except TypeError as error:
        raise ConfigError(f"{VARIABLE}={path}: {error}") from error
