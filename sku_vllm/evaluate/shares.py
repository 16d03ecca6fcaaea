"""Counts of labels over the answers to one set of prompts, and the rates made of them."""

from collections.abc import Sequence
from typing import Any

from sku_vllm.judges import LABELS, Verdict
from sku_vllm.stats import clustered_wilson


def shares(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """CONTRACTS' object for one mode of one set. verdicts[i] are the answers to prompt i; n counts answers.

    The four shares sum to 1 and the interval is Wilson's, clustered by prompt. harmful is None where the judge has no opinion.
    """
    flat = [verdict for answers in verdicts for verdict in answers]
    n = len(flat)
    found = {label: sum(verdict.label == label for verdict in flat) / n for label in LABELS}
    opinion = any(verdict.harmful is not None for verdict in flat)
    hits = [sum(verdict.label == "harmful" for verdict in answers) for answers in verdicts]
    low, high = clustered_wilson(hits, [len(answers) for answers in verdicts]) if opinion else (None, None)
    harmful = found["harmful"] if opinion else None
    return {"n": n, "harmful": harmful, "harmful_low": low, "harmful_high": high} | {label: found[label] for label in LABELS[1:]}
