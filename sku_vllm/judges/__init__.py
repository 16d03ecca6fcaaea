"""Judges, which decide whether answers are harmful, and the detectors of refusals and gibberish. Only `hf:` judges load torch."""

from sku_vllm.judges.exchange import LABELS, Exchange, Judge, Label, Labeller, Verdict
from sku_vllm.judges.labeller import decide, labeller, load_labeller
from sku_vllm.judges.spec import judge_of, judge_specs, load_judge, with_options

__all__ = [
    "LABELS",
    "Exchange",
    "Judge",
    "Label",
    "Labeller",
    "Verdict",
    "decide",
    "judge_of",
    "judge_specs",
    "labeller",
    "load_judge",
    "load_labeller",
    "with_options",
]
