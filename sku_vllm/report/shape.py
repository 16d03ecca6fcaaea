"""What the report needs from every record; more keys are welcome, so that a newer command's record still reads."""

from pathlib import Path
from typing import Any

from sku_vllm.errors import DataError

REAL = (int, float)
NUMBER = (int, float, type(None))
SHARES = dict.fromkeys(("n", "refusal", "gibberish"), REAL) | dict.fromkeys(("harmful", "harmful_low", "harmful_high"), NUMBER)
FORGET = {"*": {"*": SHARES}}
RETAIN = {"*": NUMBER}
BENCHMARK = {"task": str, "metric": str} | dict.fromkeys(("base", "edited", "difference", "stderr"), NUMBER)
PAIRED = dict.fromkeys(("rate_a", "rate_b", "difference", "low", "high", "p_value"), REAL) | {"test": str}
# Command: shape. "*" stands for every key; a key that ends in "?" may be missing or null; [shape] is a list of it.
RECORDS: dict[str, dict[str, Any]] = {
    "eval": {"forget": FORGET, "retain": RETAIN, "lm_eval?": [BENCHMARK], "agreement?": [{}]},
    "tune": {"scale": NUMBER, "curve": [{"scale": REAL, "forget": FORGET, "retain": RETAIN}]},
    "attack": {"before?": {"forget?": FORGET}, "attacks": {"*": [{"attack": str, "steps?": REAL, "forget?": FORGET}]}},
    "compare": {"a": str, "b": str, "sets": {"*": {"*": {"*": PAIRED}}}},
    "train": {"seconds?": REAL},
    "demo": {"serving?": {"*": {}}},
    "bench_agreement": {"agreement?": [{}]},
}
EVERY = {"config?": {}, "versions?": {}}
MANIFEST = {"tensors?": {"*": {}}, "adapters?": [{}]}


def check_record(file: Path, command: str, data: dict[str, Any]) -> None:
    """Raise DataError, naming file and key, where `data` is not what `sku COMMAND` writes."""
    check_shape(file, data, EVERY | RECORDS.get(command, {}))


def check_shape(file: Path, value: Any, shape: Any, at: str = "") -> None:
    """Raise DataError, naming file and key, where `value` has not this shape."""
    if isinstance(shape, dict):
        _expect(file, at, value, dict, "an object")
        for name, inner in shape.items():
            key = name.rstrip("?")
            if name == "*":
                for own, one in value.items():
                    check_shape(file, one, inner, f"{at}.{own}")
            elif key in value and not (name != key and value[key] is None):
                check_shape(file, value[key], inner, f"{at}.{key}")
            elif name == key:
                raise DataError(f"{file}: has no {f'{at}.{key}'.lstrip('.')}; write it again with the command it came from")
    elif isinstance(shape, list):
        _expect(file, at, value, list, "a list")
        for i, one in enumerate(value):
            check_shape(file, one, shape[0], f"{at}.{i}")
    else:
        _expect(file, at, value, shape, "text" if shape is str else "a number")


def _expect(file: Path, at: str, value: Any, kind: Any, said: str) -> None:
    if not isinstance(value, kind):
        raise DataError(
            f"{file}: {at.lstrip('.')} is {type(value).__name__}, expected {said}; write it again with the command it came from"
        )
