"""`NAME@SCALE`: how a trusted client names an adapter below --adapter-root as its model."""

import re
from pathlib import Path
from typing import Any

from sku_vllm.errors import InputError
from sku_vllm.serving.arms import Arm, quantised

MODEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})@([0-9.]{1,6})")


def names_adapter(model: Any) -> bool:
    """Whether a request's model has the form NAME@SCALE."""
    return isinstance(model, str) and MODEL.fullmatch(model) is not None


def adapter_below(root: str, model: str) -> Arm | None:
    """The arm of `NAME@SCALE`. None unless NAME is a directory directly below `root` (not a link) and SCALE a number in [0, 10]."""
    match = MODEL.fullmatch(model)
    if not match:
        return None
    path = Path(root).resolve() / match[1]
    if path.is_symlink() or not path.is_dir() or path.resolve().parent != Path(root).resolve():
        return None
    try:
        return Arm("adapter", "lora", str(path), quantised(match[2], model))
    except InputError:
        return None
