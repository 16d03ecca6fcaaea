"""`ADAPTER@SCALE` on command lines and in the specs of arms: which part is the adapter's path, and which its scale."""

import os

from sku_vllm.errors import ConfigError

TUNED = "tuned"  # instead of a number: the scale that `sku tune` chose


def split_at_scale(value: str, *, tuned: bool = False, prefix: str = "") -> tuple[str, str | None]:
    """The path and the text of the scale, split at the last `@`; `value` and None where it names no scale.

    A directory of exactly that name is meant, if there is one: `harm@2` is then the adapter in it, at no scale.

    Args:
        tuned: whether `@tuned` is a scale too.
        prefix: what stands before `value` where the user wrote it, for the error: `lora:`.

    Raises:
        ConfigError: there is a directory of that name, and one of the name before the `@`.
    """
    path, separator, text = value.rpartition("@")
    if not separator or not path or not (_is_number(text) or (tuned and text == TUNED)):
        return value, None
    if not os.path.isdir(value):
        return path, text
    if os.path.isdir(path):
        raise ConfigError(
            f"{prefix}{value}: may mean the directory {value} or {path} at scale {text}; write {prefix}{value}@1 for the directory at "
            f"scale 1, or {prefix}{path}/@{text} for {path} at scale {text}"
        )
    return value, None


def join_at_scale(path: str, scale: float) -> str:
    """`PATH@SCALE` so that `split_at_scale` reads it back as these two, whatever directories there are."""
    text = f"{path}@{scale:g}"
    return f"{path}/@{scale:g}" if os.path.isdir(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
