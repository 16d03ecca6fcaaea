"""Published hyperparameters, each with its source: arXiv 2402.10058, section 4.3 and appendix, and its authors' released run
(github.com/franciscoliu/SKU: README and harmful_unlearn/unlearn_harm_new.py). Open this file to add a preset."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings and where they were published."""

    settings: Mapping[str, Any]
    source: str


# e1 = e2 = 2.5, e3 = 1; AdamW at PyTorch's weight decay; linear decay without warm-up; no gradient clipping; seed 8888.
PUBLISHED = {
    "method": "sku",
    "template": "paper",
    "guided_weight": 2.5,
    "random_weight": 2.5,
    "preservation_weight": 1.0,
    "random_answers": 5,
    "lr": 2e-4,
    "weight_decay": 0.01,
    "clip": 0.0,
    "schedule": "linear",
    "steps": 1000,
    "rounds": 1,
    "batch_size": 2,
    "seed": 8888,
}
ADAPTER = ("q_proj", "v_proj")
SOURCE = "Liu et al. 2024, arXiv 2402.10058, and the authors' run: "
PRESETS = {
    "opt-2.7b": Preset({**PUBLISHED, "full": True}, SOURCE + "facebook/opt-2.7b, all weights (their LoRA variant is commented out)"),
    "llama2-7b": Preset(
        {**PUBLISHED, "rank": 32, "lora_alpha": 16, "target_modules": ADAPTER},
        SOURCE + "meta-llama/Llama-2-7b-hf, r 32, lora_alpha 16, q_proj and v_proj",
    ),
    "llama2-13b": Preset(
        {**PUBLISHED, "rank": 16, "lora_alpha": 8, "target_modules": ADAPTER},
        SOURCE + "meta-llama/Llama-2-13b-hf, r 16, lora_alpha 8, q_proj and v_proj",
    ),
}
