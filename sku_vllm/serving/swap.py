"""The worker's side of a whole-model swap: base − scale·delta, computed tensor by tensor while the engine reloads.

Loaded into every worker by `--worker-extension-cls`. Both methods return {"ok": …} and never raise: with tensor parallelism
a raising rank leaves the other ranks' replies queued, and every later call reads the wrong one.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EMBEDDINGS = ("embed_tokens", "lm_head", "wte")


class SkuWorkerExtension:
    """Mixed into vLLM's worker, whose `reload_weights` it uses."""

    def sku_check(self, model: str, source: dict[str, Any]) -> dict[str, Any]:
        """Whether the swap can work on this rank, before anything is paused."""
        try:
            return {"ok": True, "tensors": check_source(model, source, on_cpu=self._sku_on_cpu())}
        except Exception as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}

    def sku_swap(self, model: str, source: dict[str, Any] | None) -> dict[str, Any]:
        """Load the weights `source` describes; None restores the base from its files, which is exact."""
        start = time.perf_counter()
        try:
            self.reload_weights(weights_iterator=self.sku_weights(model, source))  # type: ignore[attr-defined]
            return {"ok": True, "seconds": time.perf_counter() - start}
        except Exception as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}

    def sku_weights(self, model: str, source: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
        return weights(model, source)

    def _sku_on_cpu(self) -> bool:
        return getattr(getattr(self, "device", None), "type", "cpu") == "cpu"


def check_source(model: str, source: dict[str, Any], *, on_cpu: bool) -> int:
    """Number of base tensors, if `source` fits this base.

    source: {"adapter": DIR, "scale": S} or {"checkpoint": DIR}. Raises InputError with what does not fit.
    """
    from sku_vllm.adapter import load_adapter
    from sku_vllm.checkpoint import CheckpointReader
    from sku_vllm.errors import CheckpointError, ConfigError
    from sku_vllm.placement import place

    base = CheckpointReader(model)
    tied = on_cpu and bool(base.config.get("tie_word_embeddings"))
    quantised = base.config.get("quantization_config")
    if quantised:
        raise ConfigError(
            f"{model}: holds quantised weights; an edit cannot be added to them, so serve a fused checkpoint as an upstream arm"
        )
    if "adapter" in source:
        adapter = load_adapter(source["adapter"])
        adapter.check_base(base, any_base=bool(source.get("any_base")))
        touched = set(place(base, [(adapter, float(source["scale"]))]))
    else:
        other = CheckpointReader(source["checkpoint"])
        wrong = [name for name in base.names if name not in other or other.info(name).shape != base.info(name).shape]
        wrong += [f"{name} (not in the base)" for name in other.names if name not in base]
        if wrong:
            raise CheckpointError(f"{source['checkpoint']}: is no edit of {model}: {', '.join(wrong[:20])}; fuse from this base")
        touched = {
            name
            for name in base.names
            if tied and any(part in name for part in EMBEDDINGS) and not base.tensor(name).equal(other.tensor(name))
        }
    if tied and any(part in name for name in touched for part in EMBEDDINGS):
        raise ConfigError(
            f"{model}: ties its embeddings, and on CPU vLLM keeps a stale copy of them in lm_head; swap an edit that leaves them alone"
        )
    return len(base.names)


def weights(model: str, source: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
    """Every tensor of the base under its checkpoint name, edited where `source` says so.

    All of them, always: a packed module (q, k, v; gate, up) that is reloaded in part is silent garbage.
    """
    from sku_vllm.checkpoint import CheckpointReader

    if source is None or "checkpoint" in source:
        reader = CheckpointReader(source["checkpoint"] if source else model)
        for name in reader.names:
            yield name, reader.tensor(name)
        return
    from sku_vllm.adapter import load_adapter
    from sku_vllm.placement import place

    reader = CheckpointReader(Path(model))
    placed = place(reader, [(load_adapter(source["adapter"]), float(source["scale"]))])
    for name in reader.names:
        tensor = reader.tensor(name)
        if name in placed:
            tensor = subtract(tensor, placed[name])
        yield name, tensor


def subtract(tensor: Any, placed: list[Any]) -> Any:
    """round(tensor − Σ scale·delta), by the package's own definition of a merge, so a swap equals a fuse bit for bit."""
    from sku_vllm.delta import Dense
    from sku_vllm.kernels.delta_merge import Merge, Term, delta_merge
    from sku_vllm.placement import matrix_shape

    terms = []
    for each in placed:
        if isinstance(each.delta, Dense):
            whole = each.delta.tensor()
            terms.append(Term(whole.reshape(matrix_shape(whole.shape)), None, each.scale, each.row))
        else:
            terms.append(Term(each.delta.b, each.delta.a, each.scale * each.delta.scaling, each.row))
    matrix = tensor.reshape(matrix_shape(tensor.shape)).clone()
    delta_merge([Merge(matrix, terms)])
    return matrix.reshape(tensor.shape)
