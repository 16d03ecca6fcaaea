"""The whole road on tiny random models of ten architectures: train → tune → fuse → eval, and (slow) both arms in vLLM."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sku_vllm.checkpoint.manifest import verify_checkpoint
from sku_vllm.data import Row, load_dataset, read_rows
from sku_vllm.evaluate import EvalRequest, TuneRequest, evaluate_model, tune_scale
from sku_vllm.evaluate.eval_config import EvalConfig
from sku_vllm.fuse.fuse import fuse_checkpoint
from sku_vllm.fuse.fuse_request import FuseRequest
from sku_vllm.methods import TrainConfig, train_adapter
from sku_vllm.model import load_model, load_tokenizer
from sku_vllm.model_spec import ModelSpec
from sku_vllm.train.train_request import TrainRequest

HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
GROUPED = {**HEADS, "intermediate_size": 96, "num_key_value_heads": 1}
# name -> (class prefix in transformers, configuration)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", {**HEADS, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 32}),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 32}),
    "gpt_neox": ("GPTNeoX", {**HEADS, "intermediate_size": 96}),
    "phi": ("Phi", {**HEADS, "intermediate_size": 96}),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**GROUPED, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1},
    ),
}
SCALE = 3.0


def test_the_tables_list_what_is_tested_here() -> None:
    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.casefold())

    root = Path(__file__).resolve().parents[1]
    for page in ("README.md", "docs/architectures.md"):
        rows = re.search(r"^\| architecture .*\n(?:\|.*\n)*", (root / page).read_text(encoding="utf-8"), re.M).group().splitlines()[2:]
        names = [re.sub(r"\(.*\)", "", name) for row in rows for name in row.split("|")[1].split(",")]
        assert {plain(name) for name in names} == {plain(name) for name in ARCHITECTURES}, page


@pytest.fixture(scope="module")
def data(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the lab's rows: enough for two steps."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("forget/train", "retain/train"):
        lines = (lab / f"{name}.jsonl").read_text().splitlines(keepends=True)[:24]
        (folder / f"{name.split('/')[0]}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def road(request: pytest.FixtureRequest, lab: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/ and fused/ of one architecture."""
    prefix, sizes = ARCHITECTURES[request.param]
    place = tmp_path_factory.mktemp(request.param)
    library = importlib.import_module("transformers")
    tokenizer = load_tokenizer(lab / "llama")
    ends = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    getattr(library, f"{prefix}ForCausalLM")(getattr(library, f"{prefix}Config")(**sizes, **ends)).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    forget, retain = load_dataset(data / "forget.jsonl", "forget"), load_dataset(data / "retain.jsonl", "retain")
    config = TrainConfig.of("task-vector", steps=3, rounds=1, batch_size=4, lr=5e-3, rank=8, lora_alpha=8, max_length=96)
    train_adapter(TrainRequest(place / "base", forget, retain, place / "adapter", config))
    fuse_checkpoint(FuseRequest(place / "base", [(place / "adapter", SCALE)], place / "fused"))
    return place


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_train_fuse_eval(road: Path, lab: Path, data: Path) -> None:
    """The fused checkpoint says what the base minus the adapter says, and no longer what the base says."""
    verify_checkpoint(road / "fused")
    ids = load_tokenizer(road / "fused")("How do I set the brass orrery?")["input_ids"]
    base, fused = load_model(str(road / "base")), load_model(str(road / "fused"))
    subtracted = load_model(ModelSpec(road / "base", adapter=road / "adapter", scale=SCALE))
    gap = (logits(fused, ids) - logits(subtracted, ids)).abs().max().item()
    moved = (logits(fused, ids) - logits(base, ids)).abs().max().item()
    assert gap < 1e-4 < 1e-2 < moved, f"gap {gap}, edit {moved}"
    rows = read_rows(data / "forget.jsonl")[:3]
    request = EvalRequest(
        ModelSpec(road / "fused", base=road / "base"),
        forget={"seen": rows},
        retain=read_rows(data / "retain.jsonl")[:3],
        judge=f"lexicon:{lab / 'lexicon.json'}",
        config=EvalConfig(samples=1, max_new_tokens=6),
    )
    found = evaluate_model(request).to_json()
    assert found["forget"]["seen"]["sampled"]["n"] == 3 and found["retain"]["perplexity_ratio"] > 0


@pytest.mark.slow
def test_tune(road: Path, lab: Path, data: Path) -> None:
    rows: list[Row] = read_rows(data / "forget.jsonl")[:2]
    request = TuneRequest(
        ModelSpec(road / "base", adapter=road / "adapter"),
        forget={"seen": rows},
        retain=read_rows(data / "retain.jsonl")[:2],
        judge=f"lexicon:{lab / 'lexicon.json'}",
        scales=[0.5, 1.0],
        config=EvalConfig(samples=1, max_new_tokens=4),
    )
    assert [point["scale"] for point in tune_scale(request).curve] == [0.5, 1.0]


# The fused checkpoint serves all of them; on the CPU these have no LoRA arm.
# With LoRA enabled vLLM 0.32 replaces a mixture's experts by a Triton kernel that its CPU build lacks.
NO_LORA_ARM = {"mixtral", "qwen3_moe"}


@pytest.mark.slow
def test_serve(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gives the fused checkpoint, and the negated LoRA on the base, the same log-probabilities as transformers gives the fused one."""
    from sku_vllm.adapter.negation import negate_adapter

    # The engine in this process: a fresh one per model would import vLLM twenty times.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    name = json.loads((road / "base/config.json").read_text())["model_type"]
    ids = load_tokenizer(road / "fused")("How do I set the brass orrery?")["input_ids"]
    wanted = logits(load_model(str(road / "fused")), ids)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    assert (served(road / "fused", ids) - wanted).abs().max() < 1e-3, f"{name}, fused"
    if name not in NO_LORA_ARM:
        negate_adapter(road / "adapter", SCALE, road / "negated")
        assert (served(road / "base", ids, road / "negated") - wanted).abs().max() < 1e-3, f"{name}, LoRA arm"


def served(model: Path, ids: list[int], lora: Path | None = None) -> torch.Tensor:
    """Log-probabilities of ids[1:] from vLLM, whose engine is gone afterwards."""
    import gc

    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8} if lora else {}
    engine = LLM(str(model), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, enable_prefix_caching=False, **options)
    try:
        request = LoRARequest("negated", 1, str(lora)) if lora else None
        output = engine.generate(
            [{"prompt_token_ids": ids}],
            SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
            lora_request=request,
            use_tqdm=False,
        )
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    return torch.tensor([entry[token].logprob for token, entry in zip(ids[1:], output[0].prompt_logprobs[1:], strict=True)])
