"""`make sweep`: train → fuse → load → agree, for every causal language model of transformers that a tiny configuration can be made of.

    python -m sku_vllm.benchmarks.sweep [CLASS…] [--full] [--seconds 90]

A class agrees when the fused checkpoint says what the base with its adapter subtracted says. What the road refuses, and where it does, is
listed in docs/architectures.md. Open this file when a class is left out for want of a tiny configuration.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sku_vllm.errors import SkuError

# Whatever a configuration calls it. A head is 16 wide: 64 / 4.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "word_embed_proj_dim", "dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "mlp_hidden_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "mamba_n_heads", "n_groups"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "qk_nope_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "attention_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "sliding_window"), 256),
    **dict.fromkeys(("num_nextn_predict_layers", "num_kv_shared_layers", "activation_sparsity_pattern"), 0),
    **dict.fromkeys(("rotary_dim",), 8),
    **dict.fromkeys(("attn_layer_period",), 2),  # with the offset below: the second of two layers is an attention layer
    **dict.fromkeys(("attn_layer_offset",), 1),
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
}
# What single types need, over the sizes above: one layer of each kind, and keys of their own.
LINEAR, MLA = {"layer_types": ["linear_attention", "full_attention"]}, {"num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), LINEAR),
    **dict.fromkeys(("axk1", "deepseek_v2"), MLA),
    **dict.fromkeys(("zamba", "zamba2"), {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2}),
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "kimi_linear": {**LINEAR, **MLA},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**MLA, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlm": {"emb_dim": 64},
}
# Fewer sizes for a class that does not take them all: with its own defaults for the rest, as long as that stays small.
FEW = (
    "hidden_size",
    "n_embd",
    "d_model",
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "num_attention_heads",
    "n_head",
    "intermediate_size",
)
MOST_PARAMETERS = 60_000_000
SECONDS = 90
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one class: "agrees", "differs", "refused", "no time" or "no tiny configuration"; `detail` says where and why."""

    name: str
    result: str
    detail: str = ""


def classes() -> dict[str, str]:
    """Class name to model type, of every model that AutoModelForCausalLM loads."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    found: dict[str, str] = {}
    for kind, names in NAMES.items():
        for name in [names] if isinstance(names, str) else names:
            found.setdefault(name, kind)
    return found


def tiny_model(kind: str, vocabulary: dict[str, int]) -> Any:
    """A random model of a type, of a few hundred thousand parameters; None where no tiny configuration makes one."""
    import inspect

    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    def arguments(config: Any, keys: Any) -> dict[str, Any]:
        known = inspect.signature(config).parameters
        chosen = {key: SIZES[key] for key in keys if key in known} | {key: value for key, value in vocabulary.items() if key in known}
        inner = {key: arguments(each, keys) for key, each in config.sub_configs.items() if key in known and hasattr(each, "sub_configs")}
        return chosen | inner | OWN.get(config.model_type, {})

    for keys in (SIZES, [key for key in SIZES if key != "head_dim"], FEW):
        try:
            torch.manual_seed(0)
            config = CONFIG_MAPPING[kind](**arguments(CONFIG_MAPPING[kind], keys))
            with torch.device("meta"):
                size = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                continue
            model = AutoModelForCausalLM.from_config(config).eval()
            model(input_ids=torch.tensor([[5, 6, 7]]))
            return model
        except Exception:  # configurations check what they like
            continue
    return None


def walk(name: str, kind: str, rows: tuple[Any, Any], tokenizer: Any, full: bool = False) -> Outcome:
    """The road of one class, in a temporary directory. rows: forget and retain sets. full: a dense task vector instead of a LoRA."""
    ends = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(kind, {**ends, "pad_token_id": tokenizer.pad_token_id})
    if model is None:
        return Outcome(name, "no tiny configuration")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place / "base")
        tokenizer.save_pretrained(place / "base")
        try:
            stage = "train"
            _train(place, rows, full)
            stage = "fuse"
            _fuse(place)
            stage = "load"
            gap, moved = _compare(place)
        except SkuError as error:
            return Outcome(name, "refused", f"{stage}: {str(error).replace(folder + '/', '')[:300]}")
        except TimeoutError as error:
            return Outcome(name, "no time", f"{stage}: {error}")
        except Exception as error:
            return Outcome(name, "refused", f"{stage}: {type(error).__name__}: {str(error)[:200]}")
    return Outcome(name, "agrees" if gap < TOLERANCE and gap < moved / 10 else "differs", f"gap {gap:.1e}, edit {moved:.1e}")


def _train(place: Path, rows: tuple[Any, Any], full: bool) -> None:
    from sku_vllm.methods import TrainConfig, train_adapter
    from sku_vllm.train.train_request import TrainRequest

    settings: dict[str, Any] = {"full": True, "lr": 1e-3} if full else {"rank": 4, "lora_alpha": 8, "lr": 1e-2}
    config = TrainConfig.of("task-vector", steps=2, rounds=1, batch_size=2, max_length=48, **settings)
    train_adapter(TrainRequest(place / "base", *rows, place / "adapter", config), progress=False)


def _fuse(place: Path) -> None:
    from sku_vllm.checkpoint.manifest import verify_checkpoint
    from sku_vllm.fuse import FuseRequest, fuse_checkpoint

    fuse_checkpoint(FuseRequest(place / "base", [(place / "adapter", 2.0)], place / "fused"))
    verify_checkpoint(place / "fused")


def _compare(place: Path) -> tuple[float, float]:
    """The largest difference of log-probabilities between fused and subtracted, and between fused and base."""
    from sku_vllm.model import load_model
    from sku_vllm.model_spec import ModelSpec

    specs = (ModelSpec(place / "fused"), ModelSpec(place / "base", adapter=place / "adapter", scale=2.0), ModelSpec(place / "base"))
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        fused, subtracted, base = (load_model(spec)(input_ids=ids).logits[0].float().log_softmax(-1) for spec in specs)
    return (fused - subtracted).abs().max().item(), (fused - base).abs().max().item()


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after that much time of this process on its cores: what others run beside it does not count."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def sweep(names: list[str], *, full: bool = False, seconds: int = SECONDS) -> Iterator[Outcome]:
    """The outcome of each class, by the built-in lab's rows and tokenizer; all classes where `names` is empty."""
    from sku_vllm.data import load_dataset
    from sku_vllm.lab import make_lab
    from sku_vllm.model import load_tokenizer

    known = classes()
    with tempfile.TemporaryDirectory() as folder:
        lab = make_lab(Path(folder) / "lab")
        for name in ("forget", "retain"):
            lines = (lab / name / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:12]
            (Path(folder) / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        rows = (load_dataset(Path(folder) / "forget.jsonl", "forget"), load_dataset(Path(folder) / "retain.jsonl", "retain"))
        tokenizer = load_tokenizer(lab / "llama")
        for name in names or sorted(known):
            try:
                with _limited(seconds):
                    yield walk(name, known[name], rows, tokenizer, full)
            except TimeoutError as error:
                yield Outcome(name, "no time", str(error))


def main() -> None:
    """Print a line for each class, and a summary; exit with 1 where one differs."""
    parser = argparse.ArgumentParser(prog="python -m sku_vllm.benchmarks.sweep", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="Classes such as LlamaForCausalLM; all without any.")
    parser.add_argument("--full", action="store_true", help="Dense task vectors instead of a LoRA.")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"Most processor time for one class; {SECONDS}.")
    given = parser.parse_args()
    from transformers.utils import logging

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers' own
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if unknown := [name for name in given.classes if name not in classes()]:
        parser.error(f"{', '.join(unknown)}: no class that AutoModelForCausalLM loads")
    outcomes: list[Outcome] = []
    began = time.perf_counter()
    for outcome in sweep(given.classes, full=given.full, seconds=given.seconds):
        outcomes.append(outcome)
        print(json.dumps([outcome.name, outcome.result, outcome.detail], ensure_ascii=False), flush=True)
    counts = {result: sum(each.result == result for each in outcomes) for result in dict.fromkeys(each.result for each in outcomes)}
    print(json.dumps({"classes": len(outcomes), **counts, "seconds": round(time.perf_counter() - began)}))
    sys.exit(int(any(outcome.result == "differs" for outcome in outcomes)))


if __name__ == "__main__":
    main()
