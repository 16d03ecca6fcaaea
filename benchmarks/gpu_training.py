"""Memory and speed of training at a model's real shapes: random weights, real steps, nothing written. `gpu_day.sh` runs it.

    python -m sku_vllm.benchmarks.gpu_training --width 4096 --layers 32      # the shapes of Llama-2-7B

Prints a Markdown table. Open this file to try other settings.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """Make the checkpoint, estimate each setting by real steps, and print a row for each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from sku_vllm.data import load_dataset
    from sku_vllm.lab import make_lab
    from sku_vllm.methods import TrainConfig
    from sku_vllm.model import load_tokenizer
    from sku_vllm.train.dry_run import estimate_run
    from sku_vllm.train.train_request import TrainRequest

    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        lab = make_lab(place / "lab")
        tokenizer = load_tokenizer(lab / "llama")
        heads = max(options.width // 128, 2)
        sizes = {"hidden_size": options.width, "intermediate_size": options.width * 11008 // 4096, "num_hidden_layers": options.layers}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = LlamaConfig(**sizes, **ends, vocab_size=len(tokenizer), num_attention_heads=heads, max_position_embeddings=2048)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(place / "base")
        tokenizer.save_pretrained(place / "base")
        parameters = sum(each.numel() for each in model.parameters())
        del model
        forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
        print(f"{parameters / 1e9:.2f}B parameters in bfloat16, rank 32 on all linear layers, 8 rows a step, on {device}.\n")
        print("| method | forward tokens a step | peak GiB | seconds a step |\n|---|---:|---:|---:|")
        for method in ("task-vector", "sku"):
            settings: dict[str, Any] = {"rank": 32, "batch_size": 8, "steps": 20, "rounds": 1, "max_length": 512, "dtype": "bfloat16"}
            found = estimate_run(TrainRequest(place / "base", forget, retain, place / "adapter", TrainConfig.of(method, **settings)))
            peak, seconds = found.peak_memory_bytes / 2**30, found.seconds / found.steps
            print(f"| {method} | {found.tokens_per_step:.0f} | {peak:.2f} | {seconds:.3f} |")


if __name__ == "__main__":
    main()
