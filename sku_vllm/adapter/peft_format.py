"""PEFT's LoRA format: refuse adapters whose edit is not scaling·B@A, and find the base weight that each tensor key belongs to.

Open this file when PEFT has a new option, or an adapter of another tool is refused.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sku_vllm.adapter.adapter_keys import TRAINING_ONLY, FactorKey, copied_name, factor_key, is_copy
from sku_vllm.adapter.delta import Dense, LowRank
from sku_vllm.checkpoint.reader import CheckpointReader
from sku_vllm.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
# Values of init_lora_weights that do not change the base's weights.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# PEFT options under which the edit is not scaling·B@A on the named weights: the reason and the remedy.
UNSUPPORTED = {
    "use_dora": "DoRA rescales whole columns of the base, which is not a task vector; train with use_dora=False",
    "lora_bias": "a LoRA bias belongs to no base weight; train with lora_bias=False",
    "modules_to_save": "whole modules were retrained and their old weights are not saved; train without it, or with sku train --full",
    "layer_replication": "replicated layers are not layers of the base; train without layer_replication",
    "trainable_token_indices": "retrained token rows are not LoRA factors; train without trainable_token_indices",
    "alora_invocation_tokens": "aLoRA applies to some tokens only and cannot be merged; train a plain LoRA",
    "use_qalora": "QA-LoRA pools its inputs; train a plain LoRA",
    "use_bdlora": "block-diagonal LoRA; train a plain LoRA",
    "megatron_config": "Megatron layers shard their factors; save a plain LoRA",
    "arrow_config": "Arrow routes between adapters; give each adapter on its own",
    "kasa_config": "KaSA truncates the base's weights; train a plain LoRA",
    "monteclora_config": "MonteCLoRA samples its factors; train a plain LoRA",
}
# Ends of keys that only such variants save, with the option that they belong to.
VARIANTS = {".lora_magnitude_vector": "use_dora", ".lora_magnitude_vector.weight": "use_dora", ".lora_B.bias": "lora_bias"}


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse, with the reason and the remedy, an adapter whose edit is not scaling·B@A on base weights."""
    file = path / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters have an edit of the form scaling·B@A; train one"
        )
    for key, why in UNSUPPORTED.items():
        if config.get(key):
            raise AdapterError(f"{file}: {key} is set: {why}")
    if (config.get("bias") or "none") != "none":
        raise AdapterError(f"{file}: bias={config['bias']!r} retrains biases and keeps no delta of them; train with bias='none'")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterError(
            f"{file}: init_lora_weights={config['init_lora_weights']!r} changed the base before training, so B@A is not the edit; "
            "convert it with PEFT (save_pretrained(path_initial_model_for_weight_conversion=…)) and give the converted one"
        )
    if not isinstance(config.get("target_parameters") or [], list):
        raise AdapterError(f"{file}: target_parameters must be a list of names; save the adapter again with PEFT")
    patterns = [config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, Mapping) for pattern in patterns):
        raise AdapterError(f"{file}: rank_pattern and alpha_pattern must be objects; save the adapter again with PEFT")
    targets = config.get("target_modules")
    if not isinstance(targets, str | list | None):
        raise AdapterError(f"{file}: target_modules must be a list of names, or a regular expression; save the adapter again with PEFT")
    try:
        for pattern in [*patterns[0], *patterns[1], *([targets] if isinstance(targets, str) else [])]:
            re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{file}: {pattern!r} is no regular expression ({error}); save the adapter again with PEFT") from error
    ranks, alphas = [config.get("r"), *patterns[0].values()], [config.get("lora_alpha"), *patterns[1].values()]
    numbers = [isinstance(number, int | float) and math.isfinite(number) for number in alphas]
    if not all(numbers) or not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise AdapterError(f"{file}: r and lora_alpha must be numbers, ranks whole and above 0; save the adapter again with PEFT")


def read_factors(
    file: Path, config: Mapping[str, Any], reader: CheckpointReader
) -> tuple[dict[str, LowRank | Dense], dict[str, list[LowRank]], dict[str, Dense]]:
    """The deltas, stacks and copies of `LoraAdapter`. Raises AdapterError listing every key that does not fit."""
    found, copies = _sort_keys(file, reader)
    deltas: dict[str, LowRank | Dense] = {}
    stacks: dict[str, dict[int, LowRank]] = {}
    problems = []
    for module, sides in found.items():
        key, other = sides["A"][0], sides["B"][0]
        plain = module.replace(".base_layer", "")
        rank, scaling = rank_and_scaling(config, plain)
        factors = LowRank(reader.mapped(key), reader.mapped(other), scaling)
        if not (_finite(factors.a) and _finite(factors.b)):
            problems.append(f"{key} or {other} holds NaN or infinity")
        elif config.get("target_parameters") and not is_targeted(config, plain):
            stacks.setdefault(plain, {})[module.count(".base_layer")] = factors
            continue
        elif factors.a.ndim > 2:
            problems.append(
                f"{key} {list(factors.a.shape)} is a factor of a convolution, of which no edit is subtracted (target linear layers)"
            )
        elif factors.a.ndim != 2 or factors.b.ndim != 2 or factors.a.shape[0] != factors.b.shape[1]:
            problems.append(f"{key} {list(factors.a.shape)} and {other} {list(factors.b.shape)} cannot be multiplied as B@A")
        elif factors.a.shape[0] != rank:
            problems.append(f"{key} has rank {factors.a.shape[0]}, but adapter_config.json says {rank}")
        transposed = sides["A"][1].embedding or config.get("fan_in_fan_out")
        deltas[f"{plain}.weight"] = factors.transposed if transposed else factors
    if problems:
        raise AdapterError(f"{file}: {'; '.join(problems)}; train or save the adapter again")
    inner_first = {module: [depths[depth] for depth in sorted(depths, reverse=True)] for module, depths in stacks.items()}
    return deltas, inner_first, copies


def _sort_keys(file: Path, reader: CheckpointReader) -> tuple[dict[str, dict[str, tuple[str, FactorKey]]], dict[str, Dense]]:
    """The factors by module and side, each with its key, and the tensors that are whole ones of the base."""
    found: dict[str, dict[str, tuple[str, FactorKey]]] = {}
    copies: dict[str, Dense] = {}
    strange, twice = [], []
    for key in reader.names:
        factor = factor_key(key)
        if factor:
            first = found.setdefault(factor.module, {}).setdefault(factor.side, (key, factor))[0]
            twice += [f"{first} and {key}"] if first != key else []
        elif is_copy(key):
            first = copies.setdefault(copied_name(key), Dense(reader, key)).name
            twice += [f"{first} and {key}"] if first != key else []
        elif not TRAINING_ONLY.search(key):
            strange.append(key)
    names = {factor.adapter for sides in found.values() for _, factor in sides.values()}
    if twice or len(names) > 1:
        what = f"two spellings of one tensor ({twice[0]})" if twice else f"adapters of several names ({', '.join(sorted(map(str, names)))})"
        raise AdapterError(f"{file}: holds {what}, and nothing says which is meant; save one adapter with PEFT's save_pretrained")
    strange += [key for sides in found.values() if len(sides) != 2 for key, _ in sides.values()]
    if strange or not found:
        listed = ", ".join(strange[:5]) + (", …" if len(strange) > 5 else "")
        what = f"{len(strange)} keys are not pairs of LoRA factors ({listed})" if strange else "it has no LoRA factors"
        variant = next((option for end, option in VARIANTS.items() if any(key.endswith(end) for key in strange)), None)
        remedy = "save the adapter again with PEFT's save_pretrained" if variant is None else UNSUPPORTED[variant]
        raise AdapterError(f"{file}: {what}; {remedy}")
    return found, copies


def _finite(factor: Any) -> bool:
    """Whether all elements are finite. A finite sum proves it in one pass; a sum may also overflow, so another is checked by element."""
    return math.isfinite(float(factor.float().sum())) or bool(factor.isfinite().all())


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether `target_modules` names the module; if not, its factors belong to one of its parameters, which `target_parameters` names.

    transformers packs experts' modules ("w1", "gate_proj") into one parameter ("gate_up_proj"), and PEFT then lists that parameter's name.
    """
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    return any(f".{module}".endswith(f".{target}") for target in targets)


def rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling of one module: lora_alpha / r, or / √r for rsLoRA, after rank_pattern and alpha_pattern (PEFT's matching rule)."""

    def lookup(pattern: Mapping[str, Any] | None, default: Any) -> Any:
        return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = lookup(config.get("rank_pattern"), config["r"])
    alpha = lookup(config.get("alpha_pattern"), config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
