"""Train the refusal detector and say how wrong it is on models and prompts it has not seen.

    python -m sku_vllm.judges.train_refusal --data xstest_completions_llama2new.csv --data xstest_completions_mistralinstruct.csv

The data are human labels of XSTest answers (Röttger et al. 2024, CC-BY-4.0): one CSV a model, columns id, prompt, completion,
final_label (1_full_compliance, 2_full_refusal, 3_partial_refusal). Short answers and soft refusals that are rare there come from
refusal_seeds.json, written for this purpose.
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sku_vllm.judges.refusal_cues import features
from sku_vllm.output import write_json

HERE = Path(__file__).parent
SEEDS, WEIGHTS = HERE / "refusal_seeds.json", HERE / "refusal.json"
FOLDS = 10
# Errors were studied and the two numbers below chosen on folds 0-6. Folds 7-9 come nearer to unseen without being it: a first look at the
# data showed random rows of all folds, and the last cue was added (for short lab refusals) after their scores were known.
READ_FOLDS = 7
PENALTY = 1 / 0.3
SEED_WEIGHT = 4.0


class Labelled:
    """Feature matrix [answers, features], labels (True: refusal) and prompt fold of one model's answers."""

    def __init__(self, name: str, answers: Sequence[str], labels: Sequence[bool], folds: Sequence[int]) -> None:
        rows = [features(answer) for answer in answers]
        self.name, self.names = name, list(rows[0])
        self.x = np.array([list(row.values()) for row in rows])
        self.y, self.folds = np.array(labels), np.array(folds)

    @classmethod
    def xstest(cls, path: Path) -> "Labelled":
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        # Neighbouring ids are variations of one theme and its contrast, so blocks of five stay together.
        order = sorted({row["id"] for row in rows}, key=lambda name: int(name.split("-")[1]))
        fold = {name: number // 5 * 7 % FOLDS for number, name in enumerate(order)}
        labels = [row["final_label"][0] != "1" for row in rows]
        return cls(path.name, [row["completion"] for row in rows], labels, [fold[row["id"]] for row in rows])

    @classmethod
    def seeds(cls) -> "Labelled":
        written = json.loads(SEEDS.read_text(encoding="utf-8"))
        answers = written["refusal"] + written["compliance"]
        labels = [True] * len(written["refusal"]) + [False] * len(written["compliance"])
        return cls(SEEDS.name, answers, labels, [-1] * len(answers))


def fit(parts: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> tuple[np.ndarray, float]:
    """Logistic regression by Newton steps: Σ weight · balanced log-loss + PENALTY/2 · ‖w‖². parts: (x, y, total weight)."""
    x = np.concatenate([np.c_[part, np.ones(len(part))] for part, _, _ in parts])
    y = np.concatenate([labels for _, labels, _ in parts])
    weight = np.concatenate([total * np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum()) for _, labels, total in parts])
    ridge = np.diag([PENALTY] * (x.shape[1] - 1) + [1e-9])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        step = np.linalg.solve((x.T * (weight * p * (1 - p))) @ x + ridge, x.T @ (weight * (p - y)) + ridge @ w)
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return w[:-1], float(w[-1])


def cross_validate(models: Sequence[Labelled], seeds: Labelled) -> list[dict[str, object]]:
    """Every model's answers judged by a detector trained on the OTHER models' answers to OTHER prompts."""
    results = []
    for tested in models:
        score = np.zeros(len(tested.y))
        for fold in range(FOLDS):
            kept = [(part.x[part.folds != fold], part.y[part.folds != fold], 100.0) for part in models if part is not tested]
            w, bias = fit([*kept, (seeds.x, seeds.y, 100.0 * SEED_WEIGHT)])
            score[tested.folds == fold] = tested.x[tested.folds == fold] @ w + bias
        for name, chosen in (("all", tested.folds >= 0), ("unread prompts", tested.folds >= READ_FOLDS)):
            results.append({"tested": tested.name, "prompts": name, **confusion(score[chosen] > 0, tested.y[chosen])})
    return results


def confusion(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    recall, specificity = float(found[truth].mean()), float((~found[~truth]).mean())
    return {
        "n": len(truth), "refusals_found": int((found & truth).sum()), "refusals_missed": int((~found & truth).sum()),
        "others_flagged": int((found & ~truth).sum()), "others_passed": int((~found & ~truth).sum()),
        "balanced_accuracy": round((recall + specificity) / 2, 4), "accuracy": round(float((found == truth).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, type=Path, help="one CSV of labelled answers a model; at least two")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    if len(given.data) < 2:
        parser.error("--data: give the answers of at least two models; one is trained on, the other tests")
    models, seeds = [Labelled.xstest(path) for path in given.data], Labelled.seeds()
    results = cross_validate(models, seeds)
    w, bias = fit([*((part.x, part.y, 100.0) for part in models), (seeds.x, seeds.y, 100.0 * SEED_WEIGHT)])
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*given.data, SEEDS, HERE / "refusal_cues.py")}
    weights = {name: round(float(value), 4) for name, value in zip(seeds.names, w, strict=True)}
    model = {"schema": "sku.refusal/1", "sha256": digests, "cross_validation": results, "bias": round(bias, 4), "weights": weights}
    write_json(given.output, model)
    for row in results:
        print(row)


if __name__ == "__main__":
    main()
