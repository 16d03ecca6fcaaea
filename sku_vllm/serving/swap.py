"""The worker's side of a whole-model swap: base − scale·delta, in place where the weights lie as the checkpoint has them (unquantised
on CUDA), else computed tensor by tensor while the engine reloads.

Loaded into every worker by `--worker-extension-cls`. Both methods return {"ok": …} and never raise: with tensor parallelism
a raising rank leaves the other ranks' replies queued, and every later call reads the wrong one.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sku_vllm.checkpoint import CheckpointReader
    from sku_vllm.placement import Placed
    from sku_vllm.serving.resident import Resident

# Bytes of weights that are merged together and held beside the engine's own while it reloads.
AT_ONCE = 2**26
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")


class SkuWorkerExtension:
    """Mixed into vLLM's worker, whose `reload_weights` it uses where the weights cannot be edited in place."""

    _sku_resident: "Resident | None" = None
    _sku_reloaded = False  # whether the engine's weights came through `reload_weights` and are not the base's

    def sku_check(self, model: str, source: dict[str, Any]) -> dict[str, Any]:
        """Whether the swap can work on this rank, before anything is paused; `in_place`, or `why` not."""
        try:
            tensors = check_source(model, source, on_cpu=self._sku_on_cpu())
            why = self._sku_prepare(model, source)
            return {"ok": True, "tensors": tensors, "in_place": why is None, "why": why}
        except Exception as error:
            return {"ok": False, "error": said(error)}

    def sku_swap(self, model: str, source: dict[str, Any] | None, in_place: bool = False) -> dict[str, Any]:
        """Load the weights `source` describes; None restores the base from its files, which is exact.

        in_place: every rank's `sku_check` said that it can.
        """
        start = time.perf_counter()
        try:
            if in_place and source:
                self._sku_resident.subtract(edits(model, source))  # type: ignore[union-attr]
            elif source is None and self._sku_resident and not self._sku_reloaded:
                self._sku_resident.restore()
            else:
                self._sku_reload(model, source)
            return {"ok": True, "seconds": time.perf_counter() - start}
        except Exception as error:
            return {"ok": False, "error": said(error)}

    def sku_weights(self, model: str, source: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
        return weights(model, source)

    def _sku_prepare(self, model: str, source: dict[str, Any]) -> str | None:
        """Find the resident weights an adapter would edit; why it cannot be done in place, or None."""
        from sku_vllm.checkpoint import CheckpointReader
        from sku_vllm.serving.resident import Resident

        if "adapter" not in source:
            return "a checkpoint replaces every tensor"
        if self._sku_reloaded:
            return "another swap is in force"
        if self.model_config.use_mla:  # type: ignore[attr-defined]
            return "vLLM derives other matrices from this model's attention weights"
        try:
            if self._sku_resident is None:
                self._sku_resident = Resident(self.get_model(), CheckpointReader(Path(model)))  # type: ignore[attr-defined]
            self._sku_resident.check(list(edits(model, source)))
        except Exception as error:
            if self._sku_resident is None or not self._sku_resident.edited:
                self._sku_resident = None
            return f"{type(error).__name__}: {error}"
        return None

    def _sku_reload(self, model: str, source: dict[str, Any] | None) -> None:
        from sku_vllm.serving.resident import without_adapters

        self._sku_resident, self._sku_reloaded = None, True
        with without_adapters(self.get_model()):  # type: ignore[attr-defined]
            self.reload_weights(weights_iterator=self.sku_weights(model, source))  # type: ignore[attr-defined]
        self._sku_reloaded = source is not None

    def _sku_on_cpu(self) -> bool:
        return getattr(getattr(self, "device", None), "type", "cpu") == "cpu"


def said(error: Exception) -> str:
    """Ours say enough by themselves; of others the kind matters too."""
    from sku_vllm.errors import SkuError

    return str(error) if isinstance(error, SkuError) else f"{type(error).__name__}: {error}"


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
    reader = CheckpointReader(Path(model))
    placed = edits(model, source)
    for names in batches(reader):
        tensors = {name: reader.tensor(name) for name in names}
        subtract({name: tensor for name, tensor in tensors.items() if name in placed}, placed)
        yield from tensors.items()


def batches(reader: "CheckpointReader") -> Iterator[list[str]]:
    """Names in file order, together until they reach `AT_ONCE` bytes: a merge of one tensor at a time is mostly threads starting."""
    names: list[str] = []
    size = 0
    for name in reader.names:
        names.append(name)
        size += reader.info(name).nbytes
        if size >= AT_ONCE:
            yield names
            names, size = [], 0
    if names:
        yield names


def edits(model: str, source: dict[str, Any]) -> "dict[str, list[Placed]]":
    """What an adapter subtracts from which checkpoint tensor."""
    from sku_vllm.adapter import load_adapter
    from sku_vllm.checkpoint import CheckpointReader
    from sku_vllm.placement import place

    return place(CheckpointReader(Path(model)), [(load_adapter(source["adapter"]), float(source["scale"]))])


def subtract(tensors: dict[str, Any], placed: "dict[str, list[Placed]]") -> None:
    """Each tensor becomes round(tensor − Σ scale·delta), by the merge that a fuse on this machine's CPU uses."""
    from sku_vllm.kernels.delta_merge import Merge, delta_merge
    from sku_vllm.placement import matrix_shape
    from sku_vllm.writer import terms_of

    matrices = {name: tensor.view(matrix_shape(tensor.shape)) for name, tensor in tensors.items()}
    delta_merge(
        [Merge(each, [term for edit in placed[name] for term in terms_of(edit, 0, len(each))]) for name, each in matrices.items()]
    )
