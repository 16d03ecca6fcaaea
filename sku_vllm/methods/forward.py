"""Hidden states of packed rows, on either side of the base, from one set of weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from sku_vllm.data.packing import pack_rows
from sku_vllm.errors import CheckpointError
from sku_vllm.methods import attention

CURRENT, KEPT = "default", "kept"
CHECKPOINTING = {"use_reentrant": False}  # torch's newer kind, which hooks and frozen inputs do not disturb
RELEARNED = -2  # side: the served model on an adversary's weights (relearner.py), which whoever asks has put in place


class Forward(torch.nn.Module):
    """Rows in, their last hidden states out.

    Where the architecture takes our attention, rows are packed without padding and each token has its own side; elsewhere
    (`packed` False, found out by trying) rows are right-padded and each pass has one side.

    Attributes:
        model: a PEFT model, or the plain model of a dense run. frozen: a dense run's base, where a loss compares with it.
        folded: adapters of earlier rounds and how much of each is subtracted whenever the adapter is on.
    """

    def __init__(self, model: PreTrainedModel, frozen: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model = model
        self.folded: dict[str, float] = {}
        self.packed = False
        self.use_kept = False
        self.core = model.get_base_model() if hasattr(model, "get_base_model") else model
        # In a list, so that no optimizer, wrapper or checkpoint takes the frozen copy for a part of this module.
        self.reference = [frozen if frozen is not None else self.core]

    def forward(self, rows: Sequence[Sequence[int]], sides: Sequence[int]) -> tuple[torch.Tensor, list[list[int]]]:
        """Hidden states [tokens, d] and which of them are each row's; `sides[i]` is +1, −1, RELEARNED or 0 (adapter off) for row i.

        Without `packed` all sides are alike. The adapter's scaling stays as set until the next call, so that gradient
        checkpointing recomputes the same side.
        """
        core = self.reference[0] if sides[0] == 0 else self.core
        body, device = _body(core), core.device
        if not self.packed:
            self.set_side(sides[0])
            return self._padded(body, rows, device)
        pack = pack_rows(rows, sides).to(device)
        self.set_side(_token_sides(pack.rows, sides, pack.ids) if len(set(sides)) > 1 else sides[0])
        hidden = body(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, pack=pack).last_hidden_state[0]
        return hidden, pack.rows

    def head(self, hidden: torch.Tensor, *, base: bool = False, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits as the model itself makes them from its last hidden state; `weights`: of the output layer, in the place of its own."""
        core = self.reference[0] if base else self.core
        config = core.config.get_text_config()
        output = core.get_output_embeddings()
        logits = torch.func.functional_call(output, dict(weights), hidden) if weights else output(hidden)
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

    def set_side(self, side: "int | torch.Tensor") -> None:
        """Base + side·delta for the passes that follow; a tensor [1, T, 1] gives every token its own side, 0 turns the adapter off."""
        many = isinstance(side, torch.Tensor)
        off = not many and side == 0
        sign = side if many else max(side, -1)
        names = [CURRENT, *self.folded]
        for module in self.layers:
            # PEFT's own switches also flip requires_grad on every factor, frozen ones included, twice a step.
            module._disable_adapters = off
            if not off:
                module._active_adapter = [KEPT] if self.use_kept else names
                module.scaling[CURRENT] = sign * _scaling(module, CURRENT)
                for name, share in self.folded.items():
                    module.scaling[name] = -share * _scaling(module, name)

    @contextmanager
    def reference_adapter(self, wanted: bool) -> Iterator[None]:
        """Inside, side +1 is the adapter that an earlier phase kept, where there is one and it is wanted."""
        self.use_kept = wanted and any(KEPT in module.scaling for module in self.layers)
        try:
            yield
        finally:
            self.use_kept = False

    @property
    def vocabulary(self) -> int:
        """Rows of the output head."""
        return self.core.get_output_embeddings().weight.shape[0]

    def _padded(self, body: torch.nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, list[list[int]]]:
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, :len(row)] = torch.tensor(row)
            mask[number, :len(row)] = 1
        hidden = body(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        ends = list(accumulate(lengths))
        return hidden[mask.bool().to(device)], [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]

    def choose_packing(self, rows: Sequence[Sequence[int]]) -> bool:
        """Use packing where it gives the hidden states of separate rows; says whether it does.

        Raises:
            CheckpointError: `head` does not make the model's own logits, so losses would be wrong.
        """
        rows = [list(row[:32]) for row in rows[:3]]
        with torch.no_grad():
            self.packed = False
            alone = [self([row], [1])[0] for row in rows]
            logits = self.core(input_ids=torch.tensor([rows[0]], device=self.core.device), use_cache=False).logits[0]
            if not _close(self.head(alone[0]), logits):
                raise CheckpointError(f"{self.core.config.model_type}: its logits are more than a head over hidden states; not supported")
            before = self.core.config._attn_implementation
            try:
                self._attend(attention.NAME)
                self.packed = True
                hidden, places = self(rows, [1] * len(rows))
                self(rows, [1, *[-1] * (len(rows) - 1)])
                self.packed = all(_close(hidden[mine], one) for mine, one in zip(places, alone, strict=True))
            except (TypeError, ValueError, NotImplementedError, KeyError, RuntimeError):
                self.packed = False
            if not self.packed:
                self._attend(before)
        return self.packed

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, the model attends as it came and checkpoints no gradients, since generation needs a cache."""
        before, checkpointed = self.core.config._attn_implementation, self.core.is_gradient_checkpointing
        self._attend("sdpa" if self.packed else before)
        if checkpointed:
            self.core.gradient_checkpointing_disable()
        try:
            yield
        finally:
            self._attend(before)
            if checkpointed:
                self.core.gradient_checkpointing_enable(CHECKPOINTING)

    def _attend(self, implementation: str) -> None:
        for core in {id(core): core for core in (self.core, self.reference[0])}.values():
            core.set_attn_implementation(implementation)


def _body(core: PreTrainedModel) -> torch.nn.Module:
    return getattr(core, core.base_model_prefix)


def _token_sides(rows: Sequence[Sequence[int]], sides: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
    """Each token's side, [1, T, 1]."""
    spread = torch.empty(ids.shape[1])
    for mine, side in zip(rows, sides, strict=True):
        spread[mine] = side
    return spread.to(ids.device)[None, :, None]


def _scaling(module: LoraLayer, name: str) -> float:
    """The adapter's own lora_alpha/r (rsLoRA: /√r), whatever side it is on now."""
    return module.lora_alpha[name] / (module.r[name] ** 0.5 if module.use_rslora.get(name) else module.r[name])


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of another order of summation."""
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02}.get(a.dtype, 1e-3)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1.0))
