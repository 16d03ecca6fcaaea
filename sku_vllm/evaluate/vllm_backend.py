"""vLLM's own engine as a backend: token prompts in, token answers out, in this process. The only file here that imports vllm."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.backend import Backend, Progress

# The ranks vLLM compiles LoRA kernels for.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VllmBackend:
    """`engine` with an optional LoRA request in force.

    alone: score sequences one by one. vLLM 0.32's CPU LoRA indexes the logits of prompt log-probabilities by request instead of by
    token, and its engine dies on the second request of a batch.
    """

    def __init__(self, engine: Any, lora: Any = None, *, alone: bool = False) -> None:
        self.engine = engine
        self.lora = lora
        self.alone = alone

    @property
    def context_length(self) -> int | None:
        return self.engine.llm_engine.model_config.max_model_len

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        seed: int = 0,
        ban_stop: bool = False,
        progress: Progress | None = None,
    ) -> list[list[list[int]]]:
        from vllm import SamplingParams

        asked, settings = [], []
        for index, prompt in enumerate(prompts):
            for copy, temperature in enumerate(temperatures):
                asked.append({"prompt_token_ids": list(prompt)})
                settings.append(SamplingParams(
                    temperature=temperature, max_tokens=min(max_new_tokens, self.context_length - len(prompt)), detokenize=False,
                    seed=None if temperature == 0 else (seed << 32) + index * 4096 + copy, ignore_eos=True,
                    stop_token_ids=[] if ban_stop else list(stop_ids), logit_bias=dict.fromkeys(stop_ids, -100.0) if ban_stop else None,
                ))
        outputs = self.engine.generate(asked, settings, lora_request=self.lora, use_tqdm=False)
        answers = [[token for token in output.outputs[0].token_ids if token not in stop_ids] for output in outputs]
        if progress:
            progress(len(answers))
        return [answers[start : start + len(temperatures)] for start in range(0, len(answers), len(temperatures))]

    def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[np.ndarray]:
        from vllm import SamplingParams

        # One token has to be generated, so a sequence that fills the context loses its last entry's room; those are cut by one.
        room = self.context_length - 1
        asked = [{"prompt_token_ids": list(ids)[:room]} for ids, _ in sequences]
        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        batches = [[one] for one in asked] if self.alone else [asked] if asked else []
        outputs = [output for batch in batches for output in self.engine.generate(batch, settings, lora_request=self.lora, use_tqdm=False)]
        return [
            np.array([output.prompt_logprobs[at][ids[at]].logprob for at in range(start, min(len(ids), room))], np.float32)
            for output, (ids, start) in zip(outputs, sequences, strict=True)
        ]


@contextmanager
def open_vllm(
    model: str | Path, adapter: str | Path | None, scale: float | None, *, base: str | Path | None, dtype: str, revision: str | None,
    any_base: bool, as_is: bool,
) -> Iterator[tuple[Backend, Any, Any]]:
    """An engine for the model (minus scale·delta of the adapter as a negated LoRA), its tokenizer, and the reference or None.

    Raises:
        ConfigError: vLLM is not installed, or the adapter is a dense task vector.
    """
    # stdout belongs to --json; the engine's processes inherit this.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
    except ImportError as error:
        remedy = "pip install 'sku-vllm[gpu]' or '[cpu]', or leave --backend out"
        raise ConfigError(f"--backend vllm: vLLM cannot be imported ({error}); {remedy}") from error
    from sku_vllm.adapter import load_adapter, negate
    from sku_vllm.checkpoint import CheckpointReader
    from sku_vllm.evaluate.config import EvalConfig
    from sku_vllm.evaluate.evaluate import other_base
    from sku_vllm.model import load_tokenizer, resolve_model

    place = resolve_model(model, revision)
    with tempfile.TemporaryDirectory(prefix="sku-eval-") as folder:
        settings: dict[str, Any] = {}
        lora = None
        if adapter is not None:
            loaded = load_adapter(adapter, as_is=as_is)
            loaded.check_base(CheckpointReader(place), any_base=any_base)
            if loaded.dense:
                raise ConfigError(f"--adapter {adapter}: a dense task vector cannot be a LoRA in vLLM; sku fuse it and give that --model")
            negate(adapter, 1.0 if scale is None else scale, Path(folder) / "negated", as_is=as_is)
            rank = max(loaded.config["r"], *loaded.config.get("rank_pattern", {}).values(), 1)
            # One slot more than is used: on CPU, rows without LoRA compute with the last one.
            settings = {"enable_lora": True, "max_loras": 2, "max_lora_rank": next(size for size in LORA_RANKS if size >= rank)}
            lora = LoRARequest("negated", 1, str(Path(folder) / "negated"))
        engine = LLM(
            model=str(place), dtype=dtype, disable_log_stats=True, enable_prefix_caching=False, gpu_memory_utilization=0.85, **settings
        )
        alone = lora is not None and current_platform.is_cpu()
        reference = other_base(base, dtype, EvalConfig())
        if reference is None and adapter is not None:
            @contextmanager
            def reference() -> Iterator[Backend]:
                yield VllmBackend(engine, alone=alone)

        try:
            yield VllmBackend(engine, lora, alone=alone), load_tokenizer(str(model), revision), reference
        finally:
            engine.llm_engine.engine_core.shutdown()
