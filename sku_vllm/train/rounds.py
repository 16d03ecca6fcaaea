"""Train in rounds, each on the base minus the earlier rounds' deltas, without changing the base's weights.

Earlier rounds' adapters stay in the model, frozen and with negative scaling; at the end all are combined into one adapter. Open this
file to see how an adapter is initialised, how a round is subtracted (folded), or which rank the result has.
"""

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from sku_vllm.adapter.vllm_ranks import vllm_rank
from sku_vllm.train.forward import CURRENT, Forward, scaling
from sku_vllm.train.sharding import sharded_like, whole

Factors = dict[str, torch.Tensor]


def fresh_adapter(model: PeftModel, seed: int, name: str = CURRENT) -> None:
    """Initialise an adapter anew: A uniform as PEFT does it, B zero; the same bits for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}" not in parameter_name or "lora_" not in parameter_name:
            continue
        with torch.no_grad():
            if "lora_A" in parameter_name:
                bound = parameter.shape[1] ** -0.5  # kaiming_uniform_(a=√5)
                drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
                parameter.copy_(sharded_like(drawn, parameter))
            elif "lora_embedding_B" in parameter_name:
                parameter.copy_(sharded_like(torch.randn(parameter.shape, generator=generator), parameter))
            else:
                parameter.zero_()


def set_aside(model: PeftModel, name: str) -> None:
    """Copy the current adapter to a frozen one called `name`."""
    model.add_adapter(name, model.peft_config[CURRENT])
    parameters = dict(model.named_parameters())
    for key, parameter in parameters.items():
        if f".{name}" in key and "lora_" in key:
            parameter.data.copy_(whole(parameters[key.replace(f".{name}", f".{CURRENT}")].data))
            parameter.requires_grad_(False)


def fold(passes: Forward, model: PeftModel, share: float, seed: int) -> None:
    """Subtract share·delta from what the next round starts from, and start the next adapter."""
    name = f"round{len(passes.folded) + 1}"
    set_aside(model, name)
    passes.folded[name] = share
    fresh_adapter(model, seed)


def combined(passes: Forward, model: PeftModel) -> tuple[Factors, LoraConfig, float]:
    """One adapter for everything folded so far and the current one.

    Returns:
        Factors as PEFT saves them, their config, and the relative error: 0 unless the ranks together exceed the largest that vLLM
        accepts and are compressed.
    """
    config = model.peft_config[CURRENT]
    assert isinstance(config, LoraConfig)  # made by lora_model.with_adapter
    current = _state(model, CURRENT)
    if not passes.folded:
        return current, config, 0.0
    shares = {**passes.folded, **({CURRENT: 1.0} if any(value.any() for key, value in current.items() if _is_b(key)) else {})}
    layer = next(iter(passes.layers))
    states = {name: _state(model, name) for name in shares}
    factors = {}
    for key in current:
        parts = [states[name][key] * (share * scaling(layer, name) if _is_b(key) else 1.0) for name, share in shares.items()]
        factors[key] = torch.cat(parts, dim=1 if _is_b(key) else 0)
    factors, rank, error = fit_rank(factors)
    merged = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=config.target_modules,
        task_type=config.task_type,
        bias="none",
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    return factors, merged, error


def fit_rank(factors: Mapping[str, torch.Tensor]) -> tuple[Factors, int, float]:
    """The factors at the next rank that vLLM accepts, that rank, and the relative error that this causes.

    Below the largest rank factors are padded with zeros, without error; above it they are recompressed by SVD.
    """
    held = max(value.shape[0] for key, value in factors.items() if not _is_b(key))
    rank = vllm_rank(held)
    fitted, lost, whole = {}, 0.0, 0.0
    for key, a in factors.items():
        if _is_b(key):
            continue
        partner = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        b = factors[partner]
        if held > rank:
            a, b, missing, total = recompress(a, b, rank)
            lost, whole = lost + missing, whole + total
        fitted[key] = torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])
        fitted[partner] = torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
    return fitted, rank, (lost / whole) ** 0.5 if whole else 0.0


def recompress(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best rank-`rank` factors of b@a [out, in] (Eckart and Young 1936), the squared norm they lose and the whole squared norm.

    Uses two thin QR decompositions, so that the [out, in] product is never computed.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    new_b = (q_b @ u[:, :rank]) * root
    new_a = (q_a @ v[:rank].T) * root
    return new_a.T.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous(), float((s[rank:] ** 2).sum()), float((s**2).sum())


def _state(model: PeftModel, name: str) -> Factors:
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: whole(value.detach()).float().cpu() for key, value in state.items()}


def _is_b(key: str) -> bool:
    return "lora_B" in key or "lora_embedding_B" in key
