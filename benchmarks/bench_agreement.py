"""Log-probabilities of one text from five ways to the negated model, which should agree.

    sku bench agreement --model lab/llama --adapter adapter --scale 1 --text retain/test.jsonl

The reference is the adapter in PEFT with its scaling negated (transformers). Against it: the fused checkpoint in
transformers, the fused checkpoint in vLLM, and the negated LoRA on vLLM's unmodified base; and base against base. In
float32 they differ by summation order only (≤ 1e-4). In bfloat16 the fused weights are rounded once while a LoRA arm adds
its product at run time: that difference is what this prints, as the largest and as a mean, and as KL(LoRA ‖ fused)
estimated on the tokens of the text.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from sku_vllm.cli.options import log, print_json, sku_command


def transformers_logprobs(model: Any, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Log-probability of every token after the first, texts one after another. float64 [tokens]."""
    import torch

    found = []
    with torch.inference_mode():
        for ids in texts:
            tokens = torch.tensor([ids])
            logits = model(tokens).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].double().numpy())
    return np.concatenate(found)


def vllm_logprobs(
    model: str | Path, texts: Sequence[Sequence[int]], dtype: str, lora: str | Path | None = None, rank: int = 0
) -> list[np.ndarray]:
    """Log-probabilities of those tokens from vLLM's `prompt_logprobs`: [base] or [base, base + LoRA], each float64 [tokens]."""
    # Unless told otherwise, vLLM on a CPU takes nearly all of the machine's memory for its cache, or refuses to start.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {"dtype": dtype} | ({"enable_lora": True, "max_loras": 2, "max_lora_rank": rank} if lora else {})
    engine = LLM(str(model), enforce_eager=True, max_model_len=512, enable_prefix_caching=False, **options)
    try:
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        requests = [None] + ([LoRARequest("negated", 1, str(lora))] if lora else [])
        found = []
        for request in requests:
            # One text at a time: on a CPU, prompt log-probabilities of several requests with a LoRA end vLLM's engine (0.32.0).
            outputs = [engine.generate({"prompt_token_ids": list(ids)}, wanted, use_tqdm=False, lora_request=request)[0] for ids in texts]
            found.append(
                np.array(
                    [
                        entry[token].logprob
                        for ids, output in zip(texts, outputs, strict=True)
                        for token, entry in zip(ids[1:], list(output.prompt_logprobs or ())[1:], strict=True)
                        if entry
                    ]
                )
            )
        return found
    finally:
        engine.llm_engine.engine_core.shutdown()


def difference(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Largest and mean absolute difference of two arrays of log-probabilities, in nats."""
    gap = np.abs(left - right)
    return {"max": float(gap.max()), "mean": float(gap.mean())}


def measure_agreement(model: str | Path, adapter: str | Path, scale: float, text: str | Path, dtype: str, rows: int = 32) -> dict[str, Any]:
    """Largest and mean absolute differences of log-probabilities (nats) between the ways to the negated model.

    Args:
        text: rows with prompt and response; the first `rows` of them are scored whole.
    """
    from sku_vllm.adapter.adapter import load_adapter
    from sku_vllm.adapter.negation import negate_adapter
    from sku_vllm.data import PromptTemplate, read_rows
    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest
    from sku_vllm.model import load_model, load_tokenizer
    from sku_vllm.model_spec import ModelSpec
    from sku_vllm.serving.arm_adapter import adapter_rank, served_rank

    template = PromptTemplate.of(load_tokenizer(model))
    texts = [template.encode(row).ids for row in read_rows(text, need_response=True)[:rows]]
    with tempfile.TemporaryDirectory() as folder:
        fused, negated = Path(folder) / "fused", Path(folder) / "negated"
        fuse_checkpoint(FuseRequest(model, [(adapter, scale)], fused, dtype=dtype))
        negate_adapter(adapter, scale, negated)
        base = transformers_logprobs(load_model(ModelSpec(model, dtype=dtype)), texts)
        in_peft = transformers_logprobs(load_model(ModelSpec(model, dtype=dtype, adapter=adapter, scale=scale)), texts)
        fused_transformers = transformers_logprobs(load_model(ModelSpec(fused, dtype=dtype)), texts)
        rank = served_rank([adapter_rank(load_adapter(adapter))])
        base_vllm, lora_vllm = vllm_logprobs(model, texts, dtype, negated, rank)
        (fused_vllm,) = vllm_logprobs(fused, texts, dtype)
    return {
        "dtype": dtype,
        "tokens": len(base),
        "scale": scale,
        "edit": difference(in_peft, base),
        "base: vLLM / transformers": difference(base_vllm, base),
        "fused in transformers / adapter in PEFT": difference(fused_transformers, in_peft),
        "fused in vLLM / adapter in PEFT": difference(fused_vllm, in_peft),
        "LoRA in vLLM / adapter in PEFT": difference(lora_vllm, in_peft),
        "LoRA in vLLM / fused in vLLM": difference(lora_vllm, fused_vllm) | {"kl": float((lora_vllm - fused_vllm).mean())},
    }


@sku_command("agreement")
@click.option("--model", required=True, type=click.Path(exists=True), help="Base checkpoint.")
@click.option("--adapter", required=True, type=click.Path(exists=True), help="Identification adapter.")
@click.option("--scale", type=float, default=1.0, help="Strength of the negation.")
@click.option("--text", required=True, type=click.Path(exists=True), help="Rows to score.")
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), help="Repeatable.")
@click.option("--output", type=click.Path(), help="Directory to create, with sku_bench_agreement.json for sku report.")
def command(model: str, adapter: str, scale: float, text: str, dtypes: tuple[str, ...], output: str | None, json_output: bool) -> None:
    """Log-probabilities of one text from five ways to the negated model."""
    from sku_vllm.output import check_output, output_directory, record

    if output:
        check_output(output)
    results = [measure_agreement(model, adapter, scale, text, dtype) for dtype in dtypes]
    if output:
        with output_directory(output) as directory:
            record(directory, "bench_agreement", {"agreement": results}, {"model": model, "adapter": adapter, "scale": scale, "text": text})
    if json_output:
        print_json({"agreement": results})
        return
    for result in results:
        log(f"{result['dtype']}, {result['tokens']} tokens, scale {result['scale']}: |Δ log p| in nats, largest and mean")
        for name, value in result.items():
            if isinstance(value, dict):
                log(f"  {name:42} {value['max']:.2e} {value['mean']:.2e}" + (f"  KL {value['kl']:+.2e}" if "kl" in value else ""))


if __name__ == "__main__":
    command()
