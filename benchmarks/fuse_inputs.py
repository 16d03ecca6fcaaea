"""Checkpoints and adapters for `sku bench fuse`: Llama shapes, random weights, or files of holes where only memory is measured."""

import json
import math
from pathlib import Path

# TinyLlama-1.1B's shapes; other sizes by layers and width. (layers, hidden, intermediate, key/value width)
SIZES = {"0.5B": (10, 2048, 5632, 256), "1.1B": (22, 2048, 5632, 256), "3B": (28, 3072, 8192, 1024)}
VOCABULARY, RANK, SHARDS = 32000, 32, 4


def make_base(directory: Path, size: str, *, sparse: bool = False) -> Path:
    """A Llama checkpoint of bf16 weights in 4 shards with an index, as save_pretrained would leave it.

    Weights are random, or with `sparse` holes in the file: zeros that take no room on disk.
    """
    from transformers import LlamaConfig

    layers, hidden, intermediate, narrow = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear_shapes(hidden, intermediate, narrow).items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    directory.mkdir(parents=True)
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=narrow // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(directory)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    names, written = list(shapes), 0
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        here: dict[str, tuple[int, ...]] = {}
        while names and (written < total * (shard + 1) / SHARDS or shard == SHARDS - 1):
            name = names.pop(0)
            here[name] = shapes[name]
            written += 2 * math.prod(shapes[name])
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        (_holes if sparse else _random)(directory / file, here, shard)
        weight_map |= dict.fromkeys(here, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return directory


def _random(file: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    save_file({name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}, file, metadata={"format": "pt"})


def _holes(file: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        stop = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


def linear_shapes(hidden: int, intermediate: int, narrow: int) -> dict[str, tuple[int, int]]:
    """[out, in] of one decoder layer's linear weights."""
    attention = {"q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {f"mlp.{name}": shape for name, shape in mlp.items()}


def make_adapter(base: Path, directory: Path, targets: tuple[str, ...] | None) -> Path:
    """A rank-32 LoRA with float32 factors whose delta is about 1 % of the weights, as trained ones are."""
    import torch
    from safetensors.torch import save_file

    from sku_vllm.checkpoint.reader import CheckpointReader

    torch.manual_seed(1)
    tensors, modules = {}, set()
    reader = CheckpointReader(base)
    for name in reader.names:
        module = name.removesuffix(".weight")
        kind = module.rpartition(".")[2]
        if not kind.endswith("_proj") or (targets and kind not in targets):
            continue
        modules.add(kind)
        out, inside = reader.info(name).shape
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, inside) / inside**0.5
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, RANK) * 0.003
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(modules),
        "bias": "none",
        "base_model_name_or_path": str(base),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
