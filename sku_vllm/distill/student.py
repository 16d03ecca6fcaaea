"""Make the student: the teacher's weights, shrunk and mixed with noise, or fresh ones.

Suppression leaves the knowledge in the weights, where a few steps of fine-tuning find it. Shrinking and perturbing all matrices (Ash and
Adams 2020, arXiv 1910.08475) takes it away together with everything else, and the teacher then gives the rest back: "unlearn, noise,
distill on outputs" (UNDO, Lee et al. 2025, arXiv 2506.06278). Open this file to change what the student begins with.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sku_vllm.distill.distill_config import DistillConfig
from sku_vllm.errors import ConfigError


@torch.no_grad()
def make_student(teacher: PreTrainedModel, config: DistillConfig) -> PreTrainedModel:
    """A model of the teacher's shape that trains; the teacher is not changed. The same seed gives the same weights.

    Raises:
        ConfigError: a pattern of `layer_alphas` that no matrix matches.
    """
    if config.fresh:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            student: PreTrainedModel = AutoModelForCausalLM.from_config(teacher.config, dtype=teacher.dtype).to(teacher.device)
    else:
        student = copy.deepcopy(teacher)
        _perturb(student, config)
    student.eval().requires_grad_(True)  # type: ignore[no-untyped-call]  # transformers leaves it untyped; without dropout, as the teacher
    return student


def _perturb(student: PreTrainedModel, config: DistillConfig) -> None:
    """alpha·weights + (1 − alpha)·noise in every matrix, in place; vectors (norms, biases) stay."""
    generator = torch.Generator().manual_seed(config.seed)
    matrices = {name: weight for name, weight in student.named_parameters() if weight.ndim > 1}
    for pattern in config.layer_alphas:
        only = DistillConfig(alpha=1.0, layer_alphas={pattern: 0.0})
        if not any(only.alpha_of(name) == 0 for name in matrices):
            raise ConfigError(f"--layer-alphas {pattern!r}: matches no matrix of the model, for instance not {next(iter(matrices))}")
    for name, weight in matrices.items():
        # Drawn for every matrix, also where none is used, so that the noise of one does not depend on the alphas of others.
        noise = torch.randn(weight.shape, generator=generator) * config.noise_std
        alpha = config.alpha_of(name)
        weight.copy_(alpha * weight.float() + (1 - alpha) * noise.to(weight.device))
