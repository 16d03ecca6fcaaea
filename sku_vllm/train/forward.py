"""Compute hidden states and logits of rows on any side (`method.Side`) with one copy of the weights.

Open this file to see how a side is switched on, or how packing is chosen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from sku_vllm.errors import CheckpointError
from sku_vllm.methods.method import Side
from sku_vllm.train import packed_attention as attention
from sku_vllm.train.packing import pack_rows

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPast

CURRENT, KEPT = "default", "kept"
CHECKPOINTING = {"use_reentrant": False}  # torch's newer implementation, which works with hooks and frozen inputs


class Forward(torch.nn.Module):
    """Rows in, their hidden states out: the last ones, or those of a layer in between.

    If the architecture works with `packed_attention`, rows are packed without padding and each row of a pass may have another side. If
    not (`packed` False; `choose_packing` tries it), rows are right-padded and each pass has one side. Side.ATTACKED computes as
    Side.SERVED does: the caller has put the attacked weights in place (adversary.py).

    Attributes:
        model: a PEFT model, or the plain model of a dense run. frozen: a dense run's base, where a loss compares with it.
        core: `model` without PEFT's wrapper. packed: see above. use_kept: Side.ADAPTED is the adapter that an earlier phase kept.
        folded: adapters of earlier rounds and how much of each is subtracted whenever the adapter is on.
        drawing: called while answers are drawn, with how many are done (a part counts as a part) and how many are wanted; 0 begins a draw.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, frozen: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.folded: dict[str, float] = {}
        self.packed = False
        self.use_kept = False
        self.drawing: Callable[[float, int], None] = lambda done, wanted: None
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(core, PreTrainedModel)  # LoRA replaces layers inside it
        self.core = core
        # In a list, so that no optimizer, wrapper or checkpoint takes the frozen copy for a part of this module.
        self.reference = [frozen if frozen is not None else self.core]

    def forward(
        self, rows: Sequence[Sequence[int]], sides: Sequence[Side], depth: float | None = None
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Hidden states [tokens, d], and for each row the indices of its tokens' states; `sides[i]` is the side of row i.

        The states are the last ones, which `head` makes logits of, or with a `depth` those after that share of the layers.
        Without `packed` all sides have to be equal. The adapter's scaling stays set until the next call, so that gradient
        checkpointing recomputes the same side.
        """
        core = self.reference[0] if sides[0] is Side.BASE else self.core
        body, device = _body(core), core.device
        if not self.packed:
            self.set_side(sides[0])
            return self._padded(body, rows, device, depth)
        pack = pack_rows(rows, sides).to(device)
        self.set_side(_token_signs(pack.rows, sides, pack.ids) if len(set(sides)) > 1 else sides[0])
        whole = {"use_cache": False, "output_hidden_states": depth is not None}
        hidden = _states(body(input_ids=pack.ids, position_ids=pack.positions, pack=pack, **whole), depth)[0]
        return hidden, pack.rows

    def head(self, hidden: torch.Tensor, *, base: bool = False, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits from last hidden states, scaled and capped as the model does it; `weights` replace those of the output layer."""
        core = self.reference[0] if base else self.core
        config = core.config.get_text_config()
        output = output_layer(core)
        logits: torch.Tensor = torch.func.functional_call(output, dict(weights), hidden) if weights else output(hidden)
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        if getattr(config, "final_logit_softcapping", None):
            cap = config.final_logit_softcapping
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def body(self) -> torch.nn.Module:
        """The model without its output layer."""
        return _body(self.core)

    @property
    def layers(self) -> Iterator[LoraLayer]:
        """The adapted layers; none in a dense run."""
        return (module for module in self.model.modules() if isinstance(module, LoraLayer))

    def set_side(self, side: "Side | torch.Tensor") -> None:
        """Compute base + sign·delta in the passes that follow; a tensor [1, T, 1] gives every token a sign of its own."""
        off = side is Side.BASE
        sign = side.sign if isinstance(side, Side) else side
        names = [CURRENT, *self.folded]
        for module in self.layers:
            # PEFT's own switches also flip requires_grad on every factor, frozen ones included, twice a step.
            module._disable_adapters = off
            if not off:
                module._active_adapter = [KEPT] if self.use_kept else names
                module.scaling[CURRENT] = sign * scaling(module, CURRENT)
                for name, share in self.folded.items():
                    module.scaling[name] = -share * scaling(module, name)

    @contextmanager
    def reference_adapter(self, wanted: bool) -> Iterator[None]:
        """Inside, Side.ADAPTED is the adapter that an earlier phase kept, where there is one and it is wanted."""
        self.use_kept = wanted and any(KEPT in module.scaling for module in self.layers)
        try:
            yield
        finally:
            self.use_kept = False

    @property
    def vocabulary(self) -> int:
        """Logits per token."""
        weight = output_layer(self.core).weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[0]

    def _padded(
        self, body: torch.nn.Module, rows: Sequence[Sequence[int]], device: torch.device, depth: float | None
    ) -> tuple[torch.Tensor, list[list[int]]]:
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        whole = {"use_cache": False, "output_hidden_states": depth is not None}
        hidden = _states(body(input_ids=ids.to(device), attention_mask=mask.to(device), **whole), depth)
        ends = list(accumulate(lengths))
        return hidden[mask.bool().to(device)], [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]

    def choose_packing(self, rows: Sequence[Sequence[int]]) -> bool:
        """Switch packing on if it gives the same hidden states as separate rows; returns whether it does.

        Raises:
            CheckpointError: `head` does not make the model's own logits, so losses would be wrong.
        """
        rows = [list(row[:32]) for row in rows[:3]]
        with torch.no_grad():
            self.packed = False
            alone = [self([row], [Side.ADAPTED])[0] for row in rows]
            logits = self.core(input_ids=torch.tensor([rows[0]], device=self.core.device), use_cache=False).logits[0]
            weight = output_layer(self.core).weight
            assert isinstance(weight, torch.Tensor)
            # where the widths differ, something between them changes it (RemBERT)
            if weight.shape[-1] != alone[0].shape[-1] or not _close(self.head(alone[0]), logits):
                raise CheckpointError(f"{self.core.config.model_type}: its logits are more than a head over hidden states; not supported")
            before = self.core.config._attn_implementation
            try:
                self._attend(attention.NAME)
                self.packed = True
                hidden, places = self(rows, [Side.ADAPTED] * len(rows))
                self(rows, [Side.ADAPTED, *[Side.SERVED] * (len(rows) - 1)])  # rows on different sides have to work as well
                self.packed = all(_close(hidden[mine], one) for mine, one in zip(places, alone, strict=True))
            except (TypeError, ValueError, NotImplementedError, KeyError, RuntimeError):
                self.packed = False
            if not self.packed:
                self._attend(before)
        return self.packed

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, the model has standard attention and no gradient checkpointing, since generation needs a key-value cache."""
        before, checkpointed = self.core.config._attn_implementation, self.core.is_gradient_checkpointing
        self._attend("sdpa" if self.packed else before)
        if checkpointed:
            self.core.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        try:
            yield
        finally:
            self._attend(before)
            if checkpointed:
                self.core.gradient_checkpointing_enable(CHECKPOINTING)

    def _attend(self, implementation: str) -> None:
        for core in {id(core): core for core in (self.core, self.reference[0])}.values():
            core.set_attn_implementation(implementation)


def output_layer(core: PreTrainedModel) -> torch.nn.Module:
    """The layer that makes logits of hidden states."""
    layer: torch.nn.Module = core.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    return layer


def _body(core: PreTrainedModel) -> torch.nn.Module:
    # A text model that is loaded out of a multimodal checkpoint may have the prefix of the whole (Llama 4).
    body: torch.nn.Module = getattr(core, core.base_model_prefix if hasattr(core, core.base_model_prefix) else "model")
    return body


def _states(output: "BaseModelOutputWithPast", depth: float | None) -> torch.Tensor:
    """The hidden states of a pass that a loss reads, [rows, longest, d]."""
    if depth is None:
        assert output.last_hidden_state is not None  # every body gives them, and the others below where it is asked to
        return output.last_hidden_state
    assert output.hidden_states is not None
    layers = len(output.hidden_states) - 1  # the first of them are the embeddings
    return output.hidden_states[min(max(1, round(depth * layers)), layers)]


def _token_signs(rows: Sequence[Sequence[int]], sides: Sequence[Side], ids: torch.Tensor) -> torch.Tensor:
    """Each token's sign, [1, T, 1]."""
    spread = torch.empty(ids.shape[1])
    for mine, side in zip(rows, sides, strict=True):
        spread[mine] = side.sign
    return spread.to(ids.device)[None, :, None]


def scaling(module: LoraLayer, name: str) -> float:
    """lora_alpha/r (rsLoRA: /√r) of the layer's adapter `name`, whichever side is switched on."""
    rank = module.r[name] ** 0.5 if module.use_rslora.get(name) else module.r[name]
    return float(module.lora_alpha[name] / rank)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of another order of summation."""
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02}.get(a.dtype, 1e-3)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))
