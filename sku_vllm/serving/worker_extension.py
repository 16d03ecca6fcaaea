"""The worker's part of a whole-model swap.

base − scale·delta is computed in place where the worker keeps the checkpoint's layout (unquantised weights on CUDA), else tensor by
tensor while the worker reloads its weights. vLLM adds this class to every worker (`--worker-extension-cls`). `sku_check` and
`sku_swap` return {"ok": …} and never raise: with tensor parallelism, the other ranks' replies to a call that raised stay queued,
and every later call would read the wrong reply.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sku_vllm.adapter.placement import Placed
    from sku_vllm.checkpoint.reader import CheckpointReader
    from sku_vllm.serving.in_place_edit import InPlaceEdit

# Bytes of weights that are merged together during a reload; as much memory is needed in addition to the engine's weights.
AT_ONCE = 2**26
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")


class SkuWorkerExtension:
    """Mixed into vLLM's worker, whose `reload_weights` it uses where the weights cannot be edited in place."""

    # Attributes of vLLM's worker that are used here.
    model_config: Any
    get_model: Callable[[], Any]
    reload_weights: Callable[..., Any]
    _sku_in_place: "InPlaceEdit | None" = None
    _sku_reloaded = False  # whether the engine's weights came through `reload_weights` and are not the base's

    def sku_check(self, model: str, source: dict[str, Any]) -> dict[str, Any]:
        """Check, before the engine is paused, whether the swap can work on this rank.

        Returns {"ok": True, "tensors", "in_place", "why"} (why: the reason when it cannot be in place), or {"ok": False, "error"}.
        """
        try:
            tensors = check_source(model, source, on_cpu=self._sku_on_cpu())
            why = self._sku_prepare(model, source)
            return {"ok": True, "tensors": tensors, "in_place": why is None, "why": why}
        except Exception as error:
            return {"ok": False, "error": said(error)}

    def sku_swap(self, model: str, source: dict[str, Any] | None, in_place: bool = False) -> dict[str, Any]:
        """Load the weights `source` describes; None restores the base from its files, which is exact.

        in_place: every rank's `sku_check` returned in_place.
        """
        start = time.perf_counter()
        try:
            if in_place and source:
                assert self._sku_in_place is not None  # sku_check found where the weights lie
                self._sku_in_place.subtract(edits(model, source))
            elif source is None and self._sku_in_place and not self._sku_reloaded:
                self._sku_in_place.restore()
            else:
                self._sku_reload(model, source)
            return {"ok": True, "seconds": time.perf_counter() - start}
        except Exception as error:
            return {"ok": False, "error": said(error)}

    def sku_weights(self, model: str, source: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
        """The weights that a reload loads; see `weights`. It is a method so that tests can make it fail."""
        return weights(model, source)

    def _sku_prepare(self, model: str, source: dict[str, Any]) -> str | None:
        """Find the parameters that an adapter would edit. Returns None, or why they cannot be edited in place."""
        from sku_vllm.checkpoint.reader import CheckpointReader
        from sku_vllm.serving.in_place_edit import InPlaceEdit

        if "adapter" not in source:
            return "a checkpoint replaces every tensor"
        if self._sku_reloaded:
            return "another swap is in force"
        if self.model_config.use_mla:
            return "vLLM derives other matrices from this model's attention weights"
        try:
            if self._sku_in_place is None:
                self._sku_in_place = InPlaceEdit(self.get_model(), CheckpointReader(Path(model)))
            self._sku_in_place.check(list(edits(model, source)))
        except Exception as error:
            if self._sku_in_place is None or not self._sku_in_place.edited:
                self._sku_in_place = None
            return f"{type(error).__name__}: {error}"
        return None

    def _sku_reload(self, model: str, source: dict[str, Any] | None) -> None:
        from sku_vllm.serving.in_place_edit import without_adapters

        self._sku_in_place, self._sku_reloaded = None, True
        with without_adapters(self.get_model()):
            self.reload_weights(weights_iterator=self.sku_weights(model, source))
        self._sku_reloaded = source is not None

    def _sku_on_cpu(self) -> bool:
        return getattr(getattr(self, "device", None), "type", "cpu") == "cpu"


def said(error: Exception) -> str:
    """An exception as text; its type is added unless it is one of this package's, whose messages are complete."""
    from sku_vllm.errors import SkuError

    return str(error) if isinstance(error, SkuError) else f"{type(error).__name__}: {error}"


def check_source(model: str, source: dict[str, Any], *, on_cpu: bool) -> int:
    """Check that `source` fits the base model. Returns the number of base tensors.

    source: {"adapter": DIR, "scale": S} or {"checkpoint": DIR}. Raises InputError, naming what does not fit.
    """
    from sku_vllm.adapter.adapter import load_adapter
    from sku_vllm.adapter.placement import place
    from sku_vllm.checkpoint.reader import CheckpointReader
    from sku_vllm.errors import CheckpointError, ConfigError

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
    """Every tensor of the base under its checkpoint name, edited as `source` says.

    Tensors without an edit are included: vLLM gives no error for a packed module (q, k, v; gate, up) that is reloaded only in part,
    but its weights are then wrong.
    """
    from sku_vllm.checkpoint.reader import CheckpointReader

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
    """Names in file order, in batches of about `AT_ONCE` bytes: merging one tensor at a time spends most time on starting threads."""
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
    """The edits of `source`'s adapter by checkpoint tensor."""
    from sku_vllm.adapter.adapter import load_adapter
    from sku_vllm.adapter.placement import place
    from sku_vllm.checkpoint.reader import CheckpointReader

    return place(CheckpointReader(Path(model)), [(load_adapter(source["adapter"]), float(source["scale"]))])


def subtract(tensors: dict[str, Any], placed: "dict[str, list[Placed]]") -> None:
    """Replace each tensor by round(tensor − Σ scale·delta), in place, with the kernel that `sku fuse` uses on the CPU."""
    from sku_vllm.adapter.delta import matrix_shape
    from sku_vllm.adapter.placement import terms_of
    from sku_vllm.kernels.delta_merge import Merge, delta_merge

    matrices = {name: tensor.view(matrix_shape(tensor.shape)) for name, tensor in tensors.items()}
    delta_merge([Merge(each, [term for edit in placed[name] for term in terms_of(edit, 0, len(each))]) for name, each in matrices.items()])
