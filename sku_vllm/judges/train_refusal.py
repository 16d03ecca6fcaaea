"""Train the refusal detector, and cross-validate it on models and prompts that it was not trained on.

    python -m sku_vllm.judges.train_refusal --data xstest_completions_llama2new.csv --data xstest_completions_mistralinstruct.csv

The data are human labels of XSTest answers (Röttger et al. 2024, CC-BY-4.0): one CSV a model, columns id, prompt, completion,
final_label (1_full_compliance, 2_full_refusal, 3_partial_refusal). More training examples are made from the sentence forms in
refusal_seeds.json, which were written to cover how other assistants refuse and answer; the phrases used as features come from them.
"""

import argparse
import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sku_vllm.judges.logistic import Sparse, fit
from sku_vllm.judges.refusal import WEIGHTS, phrase_share
from sku_vllm.judges.refusal_cues import features
from sku_vllm.judges.refusal_examples import FORMS, Example, written_examples
from sku_vllm.judges.refusal_phrases import phrases
from sku_vllm.output import write_json

SOURCES = (FORMS, *(Path(__file__).with_name(f"refusal_{name}.py") for name in ("cues", "phrases", "examples")))
FOLDS = 10
# The numbers below were chosen on prompt folds 0-6. How far folds 7-9 are unseen is told in benchmarks/results/refusal_judge.md.
READ_FOLDS = 7
# Groups of folds that are left out of training together. With two models this takes six fits of about 10 s instead of twenty.
LEFT_OUT = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
PENALTY = 1 / 3
MODEL_WEIGHT, WRITTEN_WEIGHT = 100.0, 800.0
# A phrase is used as a feature if it occurs in this many forms, so that the topic of a single form does not become a feature.
FORMS_PER_PHRASE = 3


@dataclass(frozen=True, slots=True)
class Labelled:
    """Answers of one source with labels (True: refusal), prompt folds (-1: none), and each one's share of the weight of its class."""

    name: str
    answers: list[str]
    y: np.ndarray
    folds: np.ndarray
    shares: np.ndarray
    total: float

    @classmethod
    def xstest(cls, path: Path, total: float) -> "Labelled":
        """The labelled answers of one model, from a CSV in XSTest's columns; `total` is the weight of all of them together."""
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        # Consecutive ids are variations of one prompt (a safe one and its unsafe contrast), so blocks of five go into one fold.
        order = sorted({row["id"] for row in rows}, key=lambda name: int(name.split("-")[1]))
        fold = {name: number // 5 * 7 % FOLDS for number, name in enumerate(order)}
        labels = np.array([row["final_label"][0] != "1" for row in rows])
        folds = np.array([fold[row["id"]] for row in rows])
        return cls(path.name, [row["completion"] for row in rows], labels, folds, np.ones(len(rows)), total)

    @classmethod
    def written(cls, examples: Sequence[Example]) -> "Labelled":
        """The examples that were written for training; they belong to no fold, so they are never tested on."""
        # A form's weight is the square root of its number of answers: 25 fillings weigh as much as five answers.
        shares = np.array([example.siblings**-0.5 for example in examples])
        labels = np.array([example.refuses for example in examples])
        return cls(FORMS.name, [example.answer for example in examples], labels, np.full(len(examples), -1), shares, WRITTEN_WEIGHT)

    def weights(self, kept: np.ndarray | bool) -> np.ndarray:
        """The weight of every answer: those kept sum to `total`, one half on refusals and one half on the rest; others get 0."""
        weight = self.shares * kept
        for label in (True, False) if weight.any() else ():
            weight[self.y == label] *= self.total / 2 / weight[self.y == label].sum()
        return weight


def vocabulary(examples: Sequence[Example]) -> list[str]:
    """The phrases that at least FORMS_PER_PHRASE forms use, sorted."""
    used = {(phrase, example.form) for example in examples for phrase in phrases(example.answer)}
    forms = Counter(phrase for phrase, _ in used)
    return sorted(phrase for phrase, count in forms.items() if count >= FORMS_PER_PHRASE)


def matrix(answers: Sequence[str], known: Sequence[str]) -> tuple[Sparse, list[str]]:
    """The features of `refusal_score` as a matrix [answers, columns], and the column names: cues, then phrases.

    One more column without a name, the last, is the constant 1.
    """
    cues = [features(answer) for answer in answers]
    names = [*cues[0], *known]
    place = {name: number for number, name in enumerate(known, len(cues[0]))}
    rows, columns, values = [], [], []
    for number, answer in enumerate(answers):
        row = [(column, value) for column, value in enumerate(cues[number].values()) if value]
        found = sorted(place[phrase] for phrase in phrases(answer) if phrase in place)
        row += [(column, phrase_share(len(found))) for column in found] + [(len(names), 1.0)]
        rows += [number] * len(row)
        columns += [column for column, _ in row]
        values += [value for _, value in row]
    return Sparse(rows, columns, values, (len(answers), len(names) + 1)), names


def cross_validate(models: Sequence[Labelled], written: Labelled, x: Sparse, start: np.ndarray) -> list[dict[str, object]]:
    """Test every model's answers with a detector trained on the other models' answers to other prompts and on the written examples.

    start: weights [columns] to start from. They only save time: the loss is convex, and weights from any start agree to 1e-6.
    """
    parts, y = [*models, written], np.concatenate([part.y for part in (*models, written)])
    begins = np.cumsum([0] + [len(part.y) for part in parts])
    results = []
    for tested, begin in zip(models, begins, strict=False):
        score = np.zeros(len(tested.y))
        for folds in LEFT_OUT:
            weight = np.concatenate([part.weights(~np.isin(part.folds, folds) if part is not tested else False) for part in parts])
            chosen = np.isin(tested.folds, folds)
            score[chosen] = x.times(fit(x, y, weight, PENALTY, start))[begin : begin + len(score)][chosen]
        for name, chosen in (("all", tested.folds >= 0), ("unread prompts", tested.folds >= READ_FOLDS)):
            results.append({"tested": tested.name, "prompts": name, **confusion(score[chosen] > 0, tested.y[chosen])})
    return results


def confusion(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Counts of hits and misses of `found` against `truth` (both bool, [answers]), balanced accuracy and accuracy (0 to 1)."""
    recall, specificity = float(found[truth].mean()), float((~found[~truth]).mean())
    return {
        "n": len(truth),
        "refusals_found": int((found & truth).sum()),
        "refusals_missed": int((~found & truth).sum()),
        "others_flagged": int((found & ~truth).sum()),
        "others_passed": int((~found & ~truth).sum()),
        "balanced_accuracy": round((recall + specificity) / 2, 4),
        "accuracy": round(float((found == truth).mean()), 4),
    }


def main() -> None:
    """The command of this module: train on --data, cross-validate, write the weights to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, type=Path, help="one CSV of labelled answers a model")
    parser.add_argument("--tested", action="append", default=[], type=Path, help="such a CSV of a model tested on, never trained on")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    if len(given.data) + len(given.tested) < 2:
        parser.error("--data: give the answers of at least two models, or --tested: one is trained on, the other tests")
    examples = written_examples()
    models = [Labelled.xstest(path, MODEL_WEIGHT) for path in given.data] + [Labelled.xstest(path, 0.0) for path in given.tested]
    written, known = Labelled.written(examples), vocabulary(examples)
    parts = [*models, written]
    x, names = matrix([answer for part in parts for answer in part.answers], known)
    y, weight = np.concatenate([part.y for part in parts]), np.concatenate([part.weights(True) for part in parts])
    w = fit(x, y, weight, PENALTY, np.zeros(x.shape[1]))
    results = cross_validate(models, written, x, w)
    weights = {name: round(float(value), 3) for name, value in zip(names, w[:-1], strict=True)}
    model = {
        "schema": "sku.refusal/2",
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*given.data, *given.tested, *SOURCES)},
        "cross_validation": results,
        "bias": round(float(w[-1]), 3),
        "cues": {name: weights[name] for name in names[: -len(known)]},
        "phrases": {name: weights[name] for name in known},
    }
    write_json(given.output, model)
    for row in results:
        print(row)


if __name__ == "__main__":
    main()
