"""ModelSpec: which model to load, which adapter to subtract and at which scale. Commands, the Python API and loaders all take one.

Open this file to add a way of naming a model; `model.py` loads the model that a spec describes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from sku_vllm.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def check_dtype(dtype: str) -> None:
    """Raises ConfigError unless `dtype` is one of DTYPES."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model, or base − scale·delta of an adapter, and the model it is compared with.

    Attributes:
        model: directory or hub id of the weights; with an adapter, the base it is subtracted from.
        revision: of a hub id; None takes the hub's default branch.
        dtype: one of DTYPES; "auto" takes what this machine computes fastest in (compute_dtype.py).
        adapter: directory of the adapter that is subtracted; None leaves the model as it is.
        scale: strength of negation; None means 1.0 where there is an adapter.
        base: the unedited model to compare with; None compares with the same weights without the adapter, if there is one.
        any_base: accept an adapter that was trained on another base.
        as_is: accept an adapter that is already negated (subtracting it puts the knowledge back).
        computed_in: what "auto" came to, once that is settled (`settle_dtype`); a run that goes on elsewhere keeps it.

    Raises:
        ConfigError: an unknown dtype, or a scale without an adapter.
    """

    model: str | Path
    revision: str | None = None
    dtype: str = "auto"
    adapter: str | Path | None = None
    scale: float | None = None
    base: str | Path | None = None
    any_base: bool = False
    as_is: bool = False
    computed_in: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "adapter", "base"):  # callers may give a Path; text makes specs comparable and JSON
            value = getattr(self, name)
            if isinstance(value, Path):
                object.__setattr__(self, name, str(value))
        check_dtype(self.dtype)
        if self.scale is not None and self.adapter is None:
            raise ConfigError(f"--scale {self.scale}: there is no --adapter to scale; name one or leave --scale out")

    @property
    def strength(self) -> float:
        """The scale in use: `scale`, or 1.0 if none is given."""
        return 1.0 if self.scale is None else self.scale

    @property
    def unedited(self) -> "ModelSpec":
        """The same weights without the adapter."""
        return replace(self, adapter=None, scale=None, base=None)

    @property
    def reference(self) -> "ModelSpec | None":
        """What the model is compared with: `base`, else the weights without the adapter; None for a model on its own."""
        if self.base is not None:
            return ModelSpec(self.base, dtype=self.dtype, computed_in=self.computed_in)
        return self.unedited if self.adapter is not None else None

    def at(self, scale: float) -> "ModelSpec":
        """The same edit at another scale."""
        return replace(self, scale=scale)
