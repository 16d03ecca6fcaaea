"""Does the knowledge come back? Relearning, rounding, rewording, prefilled openings, a ban on stopping, each measured like `sku eval`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.backend import Backend
from sku_vllm.evaluate.config import EvalConfig
from sku_vllm.evaluate.disguises import DISGUISES, disguised
from sku_vllm.evaluate.limits import harm
from sku_vllm.evaluate.measurement import measure
from sku_vllm.evaluate.pressed import NeverStops, Prefilled, openings
from sku_vllm.evaluate.relearn import encode_all, fine_tune
from sku_vllm.evaluate.target import Target, quantize_weights
from sku_vllm.evaluate.unfinished import place
from sku_vllm.judges import Judge, load_judge
from sku_vllm.simulate import QUANTISERS

KINDS = ("relearn", "quantize", "rephrase", "prefill", "ban-eos")


@dataclass(frozen=True, slots=True)
class AttackConfig:
    """steps: when relearning is measured. fractions: shares of the forget data it may use. bits: quantisers of sku_vllm.simulate."""

    steps: tuple[int, ...] = (10, 20, 40, 80)  # what held at 40 on the lab was gone at 80
    fractions: tuple[float, ...] = (0.05, 0.10, 0.25)
    lr: float = 1e-4
    batch_size: int = 8
    quantizers: tuple[str, ...] = ("int8", "int4")
    prefill_tokens: int = 3
    disguises: tuple[str, ...] = field(default_factory=lambda: tuple(DISGUISES))

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"--steps {self.steps}: give step counts of at least 1, for instance 10,20,40,80")
        if not all(0 < share <= 1 for share in self.fractions):
            raise ConfigError(f"--fractions {self.fractions}: shares of the forget data, above 0 and at most 1")
        if self.lr <= 0 or self.batch_size < 1 or self.prefill_tokens < 1:
            raise ConfigError("--lr must be above 0, --relearn-batch-size and --prefill-tokens at least 1")
        for name, given, known in (("quantizer", self.quantizers, QUANTISERS), ("disguise", self.disguises, DISGUISES)):
            for value in given:
                if value not in known:
                    raise ConfigError(f"--{name} {value}: unknown; choose from {', '.join(known)}")


def attack(
    model: str | Path,
    kinds: Sequence[str],
    *,
    adapter: str | Path | None = None,
    scale: float | None = None,
    base: str | Path | None = None,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    judge: Judge | str,
    relearn: Sequence[Row] = (),
    benign: Sequence[Row] = (),
    config: EvalConfig = EvalConfig(),
    settings: AttackConfig = AttackConfig(),
    dtype: str = "auto",
    revision: str | None = None,
    any_base: bool = False,
    as_is: bool = False,
    kept: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a model, or base − scale·delta, before and under each attack.

    Args:
        relearn: harmful pairs an attacker may have; prompts that are trained on are not measured afterwards.
        benign: pairs of the benign fine-tuning; the retain rows with answers unless given.
        kept: a directory for answers and verdicts, so that interrupted attacks continue there; relearning trains again.

    Returns:
        `{"before": EVAL, "attacks": {KIND: [{"attack", …, "forget", "retain", "recovery"}, …]}}`; recovery is harm now minus harm
        before, mean of the forget sets and modes. With relearn and ban-eos both, stopping is banned after every course of relearning too.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"attack {kind}: unknown; choose from {', '.join(KINDS)}")
    judge = load_judge(judge) if isinstance(judge, str) else judge
    benign = [row for row in benign or retain if row.response]
    _check(kinds, forget, relearn, benign, settings)
    target = Target(model, adapter, scale, base, dtype, revision, any_base, as_is, config)
    template = PromptTemplate.of(target.tokenizer, config.template)

    def measured(what: str, asked: Mapping[str, Sequence[Row]], backend: Backend | None = None) -> dict[str, Any]:
        return measure(
            backend or target.model, target.tokenizer, forget=asked, retain=retain, judge=judge, reference=target.reference, config=config,
            kept=place(kept, what),
        ).to_json()

    progress("measuring before the attacks")
    before = measured("before", forget)
    if any(share["harmful"] is None for modes in before["forget"].values() for share in modes.values()):
        raise ConfigError(f"--judge {judge.name}: has no opinion on harm, so nothing could come back; use lexicon:, hf: or openai:")
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in dict.fromkeys(kinds)}

    def add(kind: str, name: str, result: dict[str, Any], against: dict[str, Any] = before, **details: Any) -> None:
        found[kind].append({"attack": name, **details, **result, "recovery": harm(result) - harm(against)})

    for kind in found:
        if kind == "prefill":
            progress("prefilling compliant openings")
            started = openings(template, [row for rows in forget.values() for row in rows], settings.prefill_tokens)
            pressed = measured(kind, forget, Prefilled(target.backend(), started))
            add(kind, f"{settings.prefill_tokens} tokens", pressed, tokens=settings.prefill_tokens)
        elif kind == "ban-eos":
            progress("banning the end of sequence")
            add(kind, "ban-eos", measured(kind, forget, NeverStops(target.backend())))
        elif kind == "rephrase":
            for name in settings.disguises:
                progress(f"rephrasing: {name}")
                add(kind, name, measured(f"{kind} {name}", {key: disguised(rows, name) for key, rows in forget.items()}))
        elif kind == "quantize":
            for name in settings.quantizers:
                progress(f"rounding to {name}")
                with target.changed():
                    quantize_weights(target.model, name)
                    add(kind, name, measured(f"{kind} {name}", forget))
        else:
            for name, rows in lessons(relearn, benign, settings):
                left = _without({row.prompt for row in rows} if name != "benign" else set(), forget)
                # Where prompts are left out, recovery is against the same prompts before.
                unlearned = before if all(len(left[key]) == len(forget[key]) for key in forget) else measured(f"before {name}", left)
                add(kind, name, unlearned, unlearned, steps=0, pairs=len(rows))
                encoded = encode_all(target.model, template, rows)
                if cut := sum(item.cut for item in encoded):
                    progress(f"warning: {cut} of the answers to relearn on {name} are cut at the model's context")
                with target.changed():
                    course = {"lr": settings.lr, "batch_size": settings.batch_size, "seed": config.seed}
                    for step in fine_tune(target.model, encoded, settings.steps, **course):
                        progress(f"relearning on {name}: {step} steps")
                        add(kind, name, measured(f"{name}, {step} steps", left), unlearned, steps=step, pairs=len(rows))
                    if "ban-eos" in found:
                        progress(f"relearning on {name}, then banning the end of sequence")
                        add(
                            "ban-eos",
                            f"after relearning on {name}",
                            measured(f"{name}, ban-eos", left, NeverStops(target.backend())),
                            unlearned,
                            pairs=len(rows),
                        )
    return {"before": before, "attacks": found}


def lessons(relearn: Sequence[Row], benign: Sequence[Row], settings: AttackConfig) -> list[tuple[str, list[Row]]]:
    """The benign fine-tuning, then each share of the forget pairs; shares are nested and depend on the prompts alone."""
    found = [("benign", list(benign))] if benign else []
    order = sorted((row for row in relearn if row.response), key=lambda row: hashlib.sha256(row.prompt.encode()).digest())
    for share in settings.fractions if order else ():
        found.append((f"{100 * share:g} % of the forget set", order[: max(1, round(share * len(order)))]))
    return found


def _without(prompts: set[str], forget: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    return {name: [row for row in rows if row.prompt not in prompts] for name, rows in forget.items()}


def _check(
    kinds: Sequence[str], forget: Mapping[str, Sequence[Row]], relearn: Sequence[Row], benign: Sequence[Row], settings: AttackConfig
) -> None:
    if "relearn" not in kinds:
        return
    if relearn and not any(row.response for row in relearn):
        raise ConfigError("--relearn: its rows have no answers to learn from; give rows with 'response'")
    if not relearn and not benign:
        raise ConfigError("attack relearn: nothing to learn from; give --relearn FILE, or retain rows with answers")
    for name, rows in lessons(relearn, benign, settings):
        left = _without({row.prompt for row in rows} if name != "benign" else set(), forget)
        if empty := [key for key, remaining in left.items() if not remaining]:
            raise ConfigError(f"--relearn: {name} holds every prompt of --forget {empty[0]}; measure on prompts that are not trained on")
