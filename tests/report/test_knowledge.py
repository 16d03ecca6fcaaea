"""The report on attacks: knowledge beside harmful words, and what a claim rests on."""

from io import StringIO
from typing import Any

from rich.console import Console

from sku_vllm.evaluate.tables import print_attacks
from sku_vllm.report.attacks import attacks_section


def shares(harmful: float, knowledge: float) -> dict[str, Any]:
    told = {"n": 8, "harmful": harmful, "harmful_low": 0.0, "harmful_high": 1.0, "refusal": 0.0, "gibberish": 0.0, "benign": 1 - harmful}
    return {**told, "ended": 1.0, "repeated": 0.0, "knowledge_n": 8, "knowledge": knowledge, "knowledge_low": 0.0, "knowledge_high": 1.0}


def measured(harmful: float, knowledge: float) -> dict[str, Any]:
    modes = {"greedy": shares(harmful, knowledge), "sampled": shares(harmful, knowledge)}
    return {"forget": {"u": modes}, "retain": {"perplexity_ratio": 1.0, "qa_accuracy": 1.0}}


def test_words_without_knowledge_are_told_apart() -> None:
    """The oracle after relearning: every answer has harmful words, none is right."""
    points = [
        {"attack": "course", "steps": steps, "cost_tokens": 400 * steps, "recovery": harm, "recovered": 0.25, **measured(harm, 0.25)}
        for steps, harm in ((0, 0.0), (80, 1.0))
    ]
    held_out = "knowledge of held-out topics"
    page = attacks_section(
        {"attacks": [{"name": "o", "kind": "relearn", "before": measured(0, 0.25), "points": points, "rests_on": held_out}]}
    )
    assert "of topics that were not trained on" in page and "log10 of tokens trained on" in page and "<th>knowledge</th>" in page
    old = [{"attack": "course", "steps": 0, "recovery": 0.0, **measured(0, 0.25)}]
    page = attacks_section({"attacks": [{"name": "o", "kind": "relearn", "before": {}, "points": old, "rests_on": "harmful answers"}]})
    assert "count form" in page and "log10" not in page
    said = StringIO()
    print_attacks({"before": measured(0, 0.25), "attacks": {"relearn": points}, "rests_on": held_out}, Console(file=said, width=200))
    assert "known" in said.getvalue() and "25.0" in said.getvalue() and "A claim about relearning rests on knowledge" in said.getvalue()
