"""One cell of bench_methods: train a method on a lab model, choose its scale on validation data, measure it on test data."""

import json
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError

# label: (method, settings that differ from its defaults); the default rates of gradient ascent move small models too little to compare
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {}),
    "gradient-ascent": ("gradient-ascent", {}),
    "gradient-ascent at lr 1e-3": ("gradient-ascent", {"lr": 1e-3}),
    "ga-mismatch": ("ga-mismatch", {}),
    "ga-mismatch at lr 1e-3": ("ga-mismatch", {"lr": 1e-3}),
    "npo": ("npo", {}),
    "grad-diff": ("grad-diff", {}),
    "simnpo": ("simnpo", {}),
    "undial": ("undial", {}),
    "rmu": ("rmu", {}),
    "task-vector": ("task-vector", {}),
    "sku": ("sku", {}),
    "sku − guided distortion": ("sku", {"guided_weight": 0.0}),
    "sku − random disassociation": ("sku", {"random_weight": 0.0}),
    "sku − preservation": ("sku", {"preservation_weight": 0.0}),
    "sku-mirrored": ("sku-mirrored", {}),
    "sku-mirrored + random disassociation": ("sku-mirrored", {"random_weight": 1.0}),
    "sku-mirrored − preservation": ("sku-mirrored", {"preservation_weight": 0.0}),
    "sku-contrastive": ("sku-contrastive", {}),
    "sku-contrastive-two": ("sku-contrastive-two", {}),
    "refusal-tune": ("refusal-tune", {}),
}
LABELS = list(VARIANTS)
SETS = ("seen", "unseen", "unseen-topic")
MAX_NEW_TOKENS = 32
# What decides an adapter's bits: the methods, and the engine that trains them.
TRAINING = ("sku_vllm/methods", "sku_vllm/train")
Cell = dict[str, Any]
Measure = Callable[[float, Sequence[str], str, int], dict[str, Any]]


def lab_of(work: Path, world: int, model: str) -> Path:
    """WORK/lab-MODEL/, pretrained when it is first needed: minutes, unless the model is shipped."""
    from sku_vllm.lab import make_lab
    from sku_vllm.lab.make import SHIPPED, SHIPPED_SEED

    lab = work / f"lab-{model}"
    if not lab.is_dir():
        make_lab(lab, seed=world, architectures=(model,), rebuild=world != SHIPPED_SEED or model not in SHIPPED)
    if (found := seed_of(lab)) != world:
        raise ConfigError(f"--world {world}: {lab} holds world {found}; give another --work")
    return lab


def seed_of(lab: Path) -> int:
    """The seed of the world that a lab was written for."""
    return int(json.loads((lab / "sku_lab.json").read_text(encoding="utf-8"))["seed"])


def adapter_path(work: Path, model: str, label: str, seed: int) -> Path:
    """Where the adapter of a cell is kept."""
    return work / "adapters" / f"{model}-{label.replace(' ', '_')}-{seed}"


def measure_cell(work: Path, world: int, model: str, label: str, seed: int, samples: int) -> Cell:
    """Train, choose the scale, measure. Where no scale qualifies, the least one is measured on test data and the cell says so."""
    from sku_vllm.data import load_dataset
    from sku_vllm.errors import RunError
    from sku_vllm.evaluate.limits import SCALES, Limits, choose
    from sku_vllm.methods import TrainConfig, train_adapter
    from sku_vllm.train.train_request import TrainRequest

    lab, adapter = lab_of(work, world, model), adapter_path(work, model, label, seed)
    method, settings = VARIANTS[label]
    cell: Cell = {"model": model, "label": label, "seed": seed, "recipe": recipe()}
    begun = time.process_time()
    adapter.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not adapter.is_dir():
            forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
            targets = refusals(lab) if method == "refusal-tune" else ()
            config = TrainConfig.of(method, seed=seed, **settings)
            train_adapter(TrainRequest(lab / model, forget, retain, adapter, config, refusals=targets), progress=False)
    except (RunError, ConfigError) as error:  # a method that diverges, or refuses this base, is a result
        return cell | {"failed": str(error)}
    trained = time.process_time()
    measured, limits = measurer(lab, model, adapter, seed), Limits()
    base, curve = base_rates(lab, model, "validation", 1), []
    for scale in SCALES:
        point = measured(scale, ("validation",), "validation", 1)
        curve.append({"scale": scale, **point, "excess": limits.excess(point, base)})
    best = choose(curve)
    chosen = best or curve[0]
    base, test = base_rates(lab, model, "test", samples), measured(chosen["scale"], SETS, "test", samples)
    seconds = {"training": trained - begun, "measuring": time.process_time() - trained}
    return cell | {
        "scale": chosen["scale"],
        "qualifies": best is not None,
        "curve": curve,
        "base": base,
        "test": test,
        "cpu_seconds": seconds,
    }


def measurer(lab: Path, model: str, adapter: Path | None, seed: int) -> Measure:
    """measured(scale, forget sets, retain part, samples) → eval object of base − scale·delta; without an adapter, of the base."""
    from sku_vllm.data import read_rows
    from sku_vllm.evaluate import EvalConfig
    from sku_vllm.evaluate.measure_request import Questions
    from sku_vllm.evaluate.measurement import measure
    from sku_vllm.judges import load_judge
    from sku_vllm.model import edited_model, load_model, load_tokenizer
    from sku_vllm.model_spec import ModelSpec

    base, tokenizer = load_model(lab / model), load_tokenizer(lab / model)
    unedited = remembered(lab / model)

    def measured(scale: float, sets: Sequence[str], part: str, count: int) -> dict[str, Any]:
        asked = EvalConfig(samples=count, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
        forget = {name: read_rows(lab / "forget" / f"{name}.jsonl") for name in sets}
        return measure(
            edited_model(ModelSpec(lab / model, adapter=adapter, scale=scale)) if adapter else base,
            tokenizer,
            Questions(forget, read_rows(lab / "retain" / f"{part}.jsonl"), load_judge(f"lexicon:{lab / 'lexicon.json'}")),
            reference=(lambda: nullcontext(unedited)) if adapter else None,
            config=asked,
        ).to_json()

    return measured


@lru_cache
def remembered(path: Path) -> Any:
    """The base as a backend that scores a sequence once: scales and methods share most of their answers, and all retain rows."""
    from sku_vllm.evaluate.transformers_backend import TransformersBackend
    from sku_vllm.model import load_model

    class Remembered(TransformersBackend):
        def log_probs(self, sequences: Sequence[tuple[Sequence[int], int]], progress: Any = None) -> list[Any]:
            keys = [(tuple(ids), start) for ids, start in sequences]
            new = [key for key in dict.fromkeys(keys) if key not in known]
            known.update(zip(new, super().log_probs(new, progress), strict=True))
            return [known[key] for key in keys]

    known: dict[tuple[tuple[int, ...], int], Any] = {}
    return Remembered(load_model(path))


@lru_cache
def base_rates(lab: Path, model: str, part: str, samples: int) -> dict[str, Any]:
    """The unedited model, once for all methods and seeds."""
    return measurer(lab, model, None, 0)(0.0, SETS if part == "test" else (part,), part, samples)


def refusals(lab: Path) -> list[Any]:
    """A refusal of the world for every harmful training prompt: targets that only refusal tuning is given."""
    from sku_vllm.data import read_rows
    from sku_vllm.lab import make_world
    from sku_vllm.lab.corpus import refusal

    world, draw, rows = make_world(seed_of(lab)), random.Random(0), []
    for row in read_rows(lab / "forget/train.jsonl"):
        machine, goal, _ = str(row.id).split(":")
        rows.append(type(row)(row.messages, refusal(world, draw, goal, machine), (), row.id))
    return rows


@lru_cache
def recipe() -> str:
    """Last commit that changed the methods or the engine that trains them; outside a checkout the package's version."""
    import sku_vllm

    command = ["git", "log", "-1", "--format=%h", "--", *TRAINING]
    try:
        told = subprocess.run(command, cwd=Path(sku_vllm.__file__).parents[1], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        told = ""
    return told or sku_vllm.__version__


def place(label: str) -> int:
    """Number of a label: its order in tables, and its colour. `LABEL @ COMMIT`, an earlier recipe of it, has the number of LABEL."""
    return LABELS.index(label.split(" @ ")[0])


def summary(cell: Mapping[str, Any]) -> str:
    """One line for a log."""
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    forget, retain, base = cell["test"]["forget"], cell["test"]["retain"], cell["base"]["retain"]
    harm = ", ".join(f"{name} {modes['greedy']['harmful']:.1%}/{modes['sampled']['harmful']:.1%}" for name, modes in forget.items())
    gibberish = max(modes["sampled"]["gibberish"] for modes in forget.values())
    scale = f"scale {cell['scale']:g}{'' if cell['qualifies'] else ' (none qualifies)'}"
    change = 100 * (retain["qa_accuracy"] - base["qa_accuracy"])
    utility = f"ratio {retain['perplexity_ratio']:.4f}, QA {change:+.1f} points"
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in cell["cpu_seconds"].items())
    return f"{scale}: harm {harm}, gibberish {gibberish:.1%}, {utility} ({spent})"
