"""Exactly one label an answer, decided in the order harmful, refusal, gibberish, benign."""

from collections.abc import Sequence

from sku_vllm.judges.exchange import Exchange, Judge, Labeller, Verdict
from sku_vllm.judges.gibberish import is_gibberish
from sku_vllm.judges.lexicon import LexiconJudge
from sku_vllm.judges.refusal import is_refusal
from sku_vllm.judges.spec import load_judge


def load_labeller(spec: str) -> Labeller:
    """The labeller of one `--judge SPEC`; see `load_judge` for its errors."""
    judge = load_judge(spec)
    return lambda exchanges: decide(judge, exchanges, judge.judge(exchanges))


def decide(
    judge: Judge, exchanges: Sequence[Exchange], harmful: Sequence[bool | None], unlikely: Sequence[bool] | None = None
) -> list[Verdict]:
    """Labels from the judge's verdicts on harm and the built-in detectors of refusal and gibberish, which always run.

    judge: adds its lexicons' own refusal phrases to the detector.
    unlikely: which answers the unedited base finds wildly unlikely, where a base is at hand
        (`sku_vllm.evaluate.likelihood`); gibberish beside what the text alone shows.
    """
    lexicons = [part for part in getattr(judge, "judges", (judge,)) if isinstance(part, LexiconJudge)]
    strange = unlikely if unlikely is not None else [False] * len(exchanges)
    verdicts = []
    for exchange, harm, odd in zip(exchanges, harmful, strange, strict=True):
        refusal = is_refusal(exchange.response) or any(lexicon.refuses(exchange.response) for lexicon in lexicons)
        verdicts.append(Verdict.of(harm, refusal, odd or is_gibberish(exchange.response)))
    return verdicts
