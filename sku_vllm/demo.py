"""The whole road on the built-in lab: identify, negate, fuse, measure, serve both, read the metrics back.

Every stage is the library call behind the command of the same name; nothing here is special to the demo but the order.
Paths are recorded relative to the output directory, so the result can be moved and its files still point at each other.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.output import output_directory, record

BASELINES = ("task-vector", "sku")
SETS = ("seen", "unseen", "unseen-topic")
SCALES = (0.75, 0.9, 1.0)
# The lab's answers are shorter than this.
MAX_NEW_TOKENS = 40
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """What the demo runs; `requests` are spread over both arms, all of them judged."""

    model: str = "llama"
    method: str | None = None
    seed: int = 0
    samples: int = 4
    requests: int = 200
    serve: bool = True

    def __post_init__(self) -> None:
        if self.model not in ("llama", "opt"):
            raise ConfigError(f"--model {self.model}: the lab ships llama and opt; for your own model use sku train, fuse, eval and serve")
        if self.requests < 1 or self.samples < 1:
            raise ConfigError("--requests and --samples must be at least 1")


def run_demo(output: str | Path, config: DemoConfig, progress: Progress = lambda stage: None) -> dict[str, Any]:
    """Run the road into `output` and return CONTRACTS' `sku demo --json` object.

    Raises:
        ConfigError: `output` exists and is not empty.
        RunError: the server did not answer or judge what it was sent.
    """
    with output_directory(output) as folder, contextlib.chdir(folder):
        result = _road(config, progress)
        record(".", "demo", result, asdict(config))
    return result


def stage_count(config: DemoConfig) -> int:
    """How often `run_demo` reports progress."""
    trained = len({*BASELINES, config.method or default_method()})
    return 1 + trained + 2 + len(BASELINES) + 2 + (3 if config.serve else 0)


def default_method() -> str:
    from sku_vllm.methods import DEFAULT_METHOD

    return DEFAULT_METHOD


def _road(config: DemoConfig, progress: Progress) -> dict[str, Any]:
    from sku_vllm.fuse import fuse_checkpoint, verify_checkpoint
    from sku_vllm.lab import make_lab

    method = config.method or default_method()
    progress("writing the lab: a small model and its fictional world")
    lab = make_lab("lab")
    base, judge = lab / config.model, f"lexicon:{lab / 'lexicon.json'}"

    adapters = {}
    for name in dict.fromkeys((*BASELINES, method)):
        progress(f"identifying harmful knowledge: {name}")
        adapters[name] = _train(base, lab, name, config.seed)
    progress(f"choosing the scale of {method} on validation data")
    scale, qualifies = _tune(base, adapters[method], lab, judge, config.seed)
    progress(f"subtracting {method} at scale {scale:g} from the checkpoint")
    fuse_checkpoint(base, [(adapters[method], scale)], "fused")
    verify_checkpoint("fused")

    def measured(name: str, model: str | Path, **edit: Any) -> dict[str, Any]:
        progress(f"measuring {name}")
        return _measure(name, model, lab, judge, config, **edit)

    result = {
        "base": measured("base", base, base=str(base)),
        **{name: measured(name, base, adapter=str(adapters[name]), scale=1.0) for name in BASELINES},
        # What is judged is what is served: the default is measured on the fused file.
        "default": measured("default", "fused", base=str(base)),
        "method": method,
        "scale": scale,
        "qualifies": qualifies,
    }
    if config.serve:
        from sku_vllm.demo_serving import serve_both

        prompts, traffic = lab / "forget/unseen.jsonl", {"requests": config.requests, "seed": config.seed, "progress": progress}
        result["serving"] = serve_both(base, adapters[method], scale, judge, prompts, **traffic)
    result["files"] = {
        "lab": "lab",
        "model": str(base),
        "adapter": str(adapters[method]),
        "fused": "fused",
        "evaluations": "eval",
        "record": "sku_demo.json",
    }
    return result


def _train(base: Path, lab: Path, method: str, seed: int) -> Path:
    from sku_vllm.data import load_dataset
    from sku_vllm.methods import TrainConfig, train_adapter

    output = Path("adapters") / method
    output.parent.mkdir(exist_ok=True)
    forget, retain = load_dataset(lab / "forget/train.jsonl", "forget"), load_dataset(lab / "retain/train.jsonl", "retain")
    train_adapter(base, forget, retain, output, TrainConfig.of(method, seed=seed))
    return output


def _tune(base: Path, adapter: Path, lab: Path, judge: str, seed: int) -> tuple[float, bool]:
    """The scale `sku tune` chooses on validation data, and True; or 1.0, for which the adapter was trained, and False: none qualifies."""
    from sku_vllm.data import read_rows
    from sku_vllm.evaluate import EvalConfig
    from sku_vllm.evaluate.tune import tune_scale

    report = tune_scale(
        base,
        adapter,
        forget={"validation": read_rows(lab / "forget/validation.jsonl")},
        retain=read_rows(lab / "retain/validation.jsonl"),
        judge=judge,
        scales=SCALES,
        config=EvalConfig(samples=2, max_new_tokens=MAX_NEW_TOKENS, seed=seed),
    )
    return (report.scale, True) if report.qualifies else (1.0, False)


def _measure(
    name: str,
    model: str | Path,
    lab: Path,
    judge: str,
    config: DemoConfig,
    adapter: str | None = None,
    scale: float | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    from sku_vllm.evaluate.command import run_eval

    Path("eval").mkdir(exist_ok=True)
    return run_eval(
        {
            "model": str(model),
            "adapter": adapter,
            "scale": scale,
            "base": base,
            "output": f"eval/{name}",
            "forget": {kind: str(lab / "forget" / f"{kind}.jsonl") for kind in SETS},
            "retain": str(lab / "retain/test.jsonl"),
            "judge": (judge,),
            "samples": config.samples,
            "temperature": 1.0,
            "max_new_tokens": MAX_NEW_TOKENS,
            "seed": config.seed,
            "batch_size": 256,
            "template": None,
            "dtype": "auto",
            "backend": "transformers",
            "revision": None,
            "any_base": False,
            "as_is": False,
            "columns": (),
            "resume": False,
        }
    )
