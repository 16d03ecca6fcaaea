"""OpenUnlearning's measures of forgetting, from the responses that forget rows have: probability, ROUGE-L recall and truth ratio.

They say how much of the given answer a model still knows, whatever it does with the question, as TOFU (Maini et al. 2024, arXiv 2401.06121)
and OpenUnlearning (Dorna et al. 2025, arXiv 2506.12618) report it, so that numbers can be laid beside theirs:

- probability: P(answer | prompt)^(1/|answer|), the geometric mean of the probabilities of its tokens, its end token included.
- rouge_l: ROUGE-L recall (Lin 2004) of the greedy answer against the response, words stemmed. Theirs are of up to 200 tokens.
- truth_ratio: R = (geometric mean of the probabilities of the wrong answers) / (probability of the right one), as min(R, 1/R): 1 where the
  model cannot tell them apart, 0 where it can. Rows with `perturbed_answer` have one; the right answer is the `paraphrased_answer`, or
  else the response.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.evaluate.backend import Backend


def forget_quality(
    model: Backend, template: PromptTemplate, forget: Mapping[str, Sequence[Row]], greedy: Sequence[tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """{set: measures} of the sets in which some row has a response.

    Args:
        greedy: the model's greedy answers, each with the name of its set.
    """
    found = {}
    for name, rows in forget.items():
        if any(row.response for row in rows):
            again = rouge_l(rows, [text for of, text in greedy if of == name])
            own = likelihoods(model, template, rows)
            found[name] = {"n": own["n"], "rouge_l": again, **own}
    return found


def likelihoods(model: Backend, template: PromptTemplate, rows: Sequence[Row]) -> dict[str, Any]:
    """The measures that need no answer of the model: `probability` and `truth_ratio`, with how many rows each is of."""
    asked = [row for row in rows if row.response]
    likely = mean_log_probs(model, template, asked)
    ratios = truth_ratios(model, template, [row for row in asked if row.perturbed])
    return {
        "n": len(asked),
        "probability": float(np.exp(likely).mean()),
        "truth_ratio": float(np.mean(ratios)) if len(ratios) else None,
        "truth_ratio_n": len(ratios),
    }


def mean_log_probs(model: Backend, template: PromptTemplate, rows: Sequence[Row]) -> np.ndarray:
    """Mean log-probability of the tokens of each row's response, its end token included, [rows]."""
    encoded = [template.encode(row, model.context_length) for row in rows]
    scored = model.log_probs([(item.ids, item.answer_start) for item in encoded])
    return np.array([one.mean(dtype=np.float64) for one in scored])


def truth_ratios(model: Backend, template: PromptTemplate, rows: Sequence[Row]) -> list[float]:
    """min(R, 1/R) of every row, R as above; OpenUnlearning's `closer_to_1_better`."""
    right = mean_log_probs(model, template, [dataclasses.replace(row, response=row.paraphrased or row.response) for row in rows])
    wrong = mean_log_probs(model, template, [dataclasses.replace(row, response=text) for row in rows for text in row.perturbed])
    found, at = [], 0
    for row, likely in zip(rows, right, strict=True):
        mean = wrong[at : at + len(row.perturbed)].mean()
        found.append(math.exp(-abs(float(mean - likely))))
        at += len(row.perturbed)
    return found


def rouge_l(rows: Sequence[Row], answers: Sequence[str]) -> float | None:
    """Mean ROUGE-L recall of the answers against the rows' responses; None where rouge-score is not installed ('sku-vllm[eval]')."""
    if importlib.util.find_spec("rouge_score") is None:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [(row.response, answer) for row, answer in zip(rows, answers, strict=True) if row.response]
    return float(np.mean([scorer.score(right, answer)["rougeL"].recall for right, answer in pairs]))
