"""What a server was told: the flags of `sku serve`, or the same keys in the YAML file that SKU_SERVE_CONFIG names."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.serving.arms import Arm, parse_arms, parse_split

VARIABLE = "SKU_SERVE_CONFIG"


@dataclass(slots=True)
class ServeConfig:
    """One server's arms, judge and rules. Validates itself without touching an adapter or a judge.

    arms: NAME=SPEC as on the command line. split: weights by name. judge_sample: share of answers judged, per arm.
    judge_queue: answers that may wait for the judge; more are dropped and counted. shadow: TO=SHARE, the share of requests
    replayed to arm TO for judging. rollback_if: a rule such as "harmful>0.05 after 200". state: a directory that outlives
    the server. adapter_root: trusted clients may name NAME@SCALE for an adapter directly below it.
    run: the private directory of materialised adapters and, without `state`, of the routing table.
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

    def __post_init__(self) -> None:
        arms = self.parsed_arms()
        parse_split(self.split, list(arms))
        if not 0 <= self.judge_sample <= 1:
            raise ConfigError(f"--judge-sample {self.judge_sample}: a share between 0 and 1")
        if self.judge_queue < 1:
            raise ConfigError(f"--judge-queue {self.judge_queue}: at least 1")
        if self.token is not None and len(self.token) < 8:
            raise ConfigError("--token: at least 8 characters, for instance from `openssl rand -hex 16`")
        if self.shadow is not None:
            self.parsed_shadow()
        if self.rollback_if is not None:
            from sku_vllm.serving.guard import parse_rule

            parse_rule(self.rollback_if)
        if self.adapter_root is not None and not Path(self.adapter_root).is_dir():
            raise ConfigError(f"--adapter-root {self.adapter_root}: no such directory")
        for flag in ("rollback_if", "drift", "keep_judged"):
            if getattr(self, flag) and not self.judge:
                raise ConfigError(f"--{flag.replace('_', '-')}: needs --judge, whose verdicts it works on")

    def parsed_arms(self) -> dict[str, Arm]:
        return parse_arms(self.arms)

    def parsed_split(self) -> dict[str, float]:
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

    def dump(self, path: Path) -> None:
        """Write the YAML that SKU_SERVE_CONFIG can name; 0600, since it may hold the control token."""
        import yaml

        from sku_vllm.output import write_text

        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), mode=0o600)


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
