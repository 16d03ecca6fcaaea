"""The file that --follow names: YAML with `arms: {NAME: SPEC}` and `split: {NAME: WEIGHT}`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.serving.arms import check_split, parse_arms, scale_looked_up


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the file asks for: {arm: spec} and {arm: weight}."""

    arms: dict[str, str]
    split: dict[str, float]


def read_wanted(path: Path) -> Wanted:
    """Read and check the file.

    Raises:
        ConfigError: it is missing, not such YAML, or its arms or split make no sense.
    """
    import yaml

    try:
        value: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--follow {path}: {error}") from error
    if not isinstance(value, dict) or set(value) != {"arms", "split"} or not all(isinstance(each, dict) for each in value.values()):
        raise ConfigError(f"--follow {path}: expected `arms: {{NAME: SPEC}}` and `split: {{NAME: WEIGHT}}`, and nothing else")
    arms = {str(name): scale_looked_up(str(spec), f"--follow {path}: {name}") for name, spec in value["arms"].items()}
    parsed = parse_arms([f"{name}={spec}" for name, spec in arms.items()])
    specs = {name: arm.spec for name, arm in parsed.items()}
    return Wanted(specs, check_split(value["split"], list(specs), f"--follow {path}"))
