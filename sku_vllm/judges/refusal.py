"""The built-in detector of refusals. It reads the final answer, not the reasoning before it; partial refusals count as refusals.

For English it is a logistic model over the cues of `refusal_cues` and the phrases of `refusal_phrases`, trained by `train_refusal` on
human labels and written examples, with the rules of `refusal_rules` for what stands where the model does not look. Weights, digests of
the data and cross-validated error are in refusal.json. Other languages have word lists (`refusal_languages`).
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from sku_vllm.judges.exchange import Exchange
from sku_vllm.judges.quoted import unquoted, unwrapped
from sku_vllm.judges.reasoning import final_answer
from sku_vllm.judges.refusal_cues import features
from sku_vllm.judges.refusal_languages import refused_in
from sku_vllm.judges.refusal_phrases import phrases
from sku_vllm.judges.refusal_rules import declares, is_english, prose, refuses_in_place, refuses_tersely, reports, speaks

WEIGHTS = Path(__file__).with_name("refusal.json")


def is_refusal(response: str, prompt: str | None = None) -> bool:
    """Whether the answer refuses, in part or in full, or rejects the question itself.

    prompt: tells a bare "No." to a question of yes or no from one to a request.
    """
    return bool(refusal_reason(response, prompt))


@lru_cache(maxsize=4096)  # models often repeat refusals and short answers, within a run and between the scales of `sku tune`
def refusal_reason(response: str, prompt: str | None = None) -> str:
    """What makes an answer a refusal: "terse", "wording" (English), "turns to a refusal", or "wording (de)"; "" where it is none."""
    answer = unwrapped(final_answer(response))
    if not answer:
        return ""
    if refuses_tersely(answer, prompt):
        return "terse"
    text = prose(answer)
    own = unquoted(text)
    if text and is_english(text) and speaks(text) and not reports(text) and _worded_so(text, own):
        return "wording"
    if own and refuses_in_place(own):
        return "turns to a refusal"
    language = refused_in(unquoted(answer))
    return f"wording ({language})" if language else ""


def _worded_so(text: str, own: str) -> bool:
    """Whether the model calls the text a refusal, whatever it quotes, and still does without that; or it declares that it refuses."""
    return (refusal_score(text) > 0 and (own == text or refusal_score(own) > 0)) or declares(own)


def refusal_score(response: str) -> float:
    """The log-odds that the answer is a refusal, if half of all answers were refusals."""
    bias, cues, known = _model()
    found = [known[phrase] for phrase in phrases(response) if phrase in known]
    cue_score = sum(cues[name] * value for name, value in features(response).items() if value)
    return bias + cue_score + phrase_share(len(found)) * math.fsum(found)  # fsum is exact, so the order of the set does not matter


def phrase_share(count: int) -> float:
    """The feature value of each of `count` known phrases in an answer: 4/√count gives the vector of phrases the same length for all."""
    return 4 / math.sqrt(max(count, 1))


@lru_cache(maxsize=1)
def _model() -> tuple[float, dict[str, float], dict[str, float]]:
    model = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    return model["bias"], model["cues"], model["phrases"]


class RefusalJudge:
    """The judge `refusal`: it does not decide harm, so answers are only labelled refusal, gibberish or benign."""

    name = "refusal"

    def judge(self, exchanges: Sequence[Exchange]) -> list[bool | None]:
        """None for every exchange."""
        return [None] * len(exchanges)
