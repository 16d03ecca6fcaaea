"""`sku eval` as a function: load, attach, measure, compare with the base."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sku_vllm.data import Row
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.backend import Backend, Progress
from sku_vllm.evaluate.config import BACKENDS, EvalConfig
from sku_vllm.evaluate.measurement import EvalReport, Reference, as_backend, measure
from sku_vllm.judges import Judge, load_judge
from sku_vllm.model import attach_adapter, load_model, load_tokenizer, set_scale


def evaluate_model(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    scale: float | None = None,
    base: str | Path | None = None,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    judge: Judge | str,
    dtype: str = "auto",
    backend: str = "transformers",
    revision: str | None = None,
    any_base: bool = False,
    as_is: bool = False,
    kept: Path | None = None,
    progress: Progress | None = None,
    config: EvalConfig | None = None,
    **settings: object,
) -> EvalReport:
    """Measure a model directory, or base − scale·delta of an adapter, against `base` (or against the model with the adapter off).

    Args:
        config: how to ask; or give its fields as keywords (samples, temperature, max_new_tokens, seed, batch_size, template).
        backend: "transformers" or "vllm" (vLLM's own engine in this process).
        kept: see `measure`.
    """
    config = config or EvalConfig(**settings)
    judge = load_judge(judge) if isinstance(judge, str) else judge
    if scale is not None and adapter is None:
        raise ConfigError(f"--scale {scale}: there is no --adapter to scale; name one or leave --scale out")
    if backend not in BACKENDS:
        raise ConfigError(f"--backend {backend}: unknown; choose from {', '.join(BACKENDS)}")
    arguments = {"forget": forget, "retain": retain, "judge": judge, "config": config, "kept": kept, "progress": progress}
    if backend == "vllm":
        from sku_vllm.evaluate.vllm_backend import open_vllm

        opening = open_vllm(model, adapter, scale, base=base, dtype=dtype, revision=revision, any_base=any_base, as_is=as_is)
        with opening as (engine, tokenizer, reference):
            return measure(engine, tokenizer, reference=reference, **arguments)
    tokenizer = load_tokenizer(str(model), revision)
    loaded = load_model(str(model), dtype=dtype, revision=revision)
    if adapter is None:
        return measure(loaded, tokenizer, reference=other_base(base, dtype, config), **arguments)
    scale = 1.0 if scale is None else scale
    loaded = attach_adapter(loaded, str(adapter), scale, any_base=any_base, as_is=as_is)
    reference = other_base(base, dtype, config) or adapter_off(loaded, scale, config)
    return measure(loaded, tokenizer, reference=reference, **arguments)


def adapter_off(model: object, scale: float, config: EvalConfig) -> Reference:
    """The base out of the same weights: the adapter's scale at 0 while it is asked, `scale` again afterwards."""

    @contextmanager
    def opened() -> Iterator[Backend]:
        set_scale(model, 0.0)
        try:
            yield as_backend(model, config)
        finally:
            set_scale(model, scale)

    return opened


def other_base(base: str | Path | None, dtype: str, config: EvalConfig) -> Reference | None:
    if base is None:
        return None

    @contextmanager
    def opened() -> Iterator[Backend]:
        yield as_backend(load_model(str(base), dtype=dtype), config)

    return opened
