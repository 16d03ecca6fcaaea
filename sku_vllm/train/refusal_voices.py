"""Refusals of the package's own, for a base that gives none by itself: many voices, fitted to how the request is put.

They serve as examples when the base is asked to refuse, and as targets where that does not work either. Open this file to change how they
sound. None of them repeats words of the request, which may be harmful.
"""

from collections.abc import Sequence

import numpy as np

from sku_vllm.data import Row

# What the first words of a request ask for → the verb that a refusal of it takes.
ASKS = (
    (("write", "compose", "draft"), "write that"),
    (("tell", "say"), "tell you that"),
    (("give", "list", "name", "show", "provide"), "give you that"),
    (("explain", "describe", "teach", "how"), "explain how to do that"),
    (("can", "could", "will", "would", "please", "help"), "help you with that"),
    (("why", "what", "which", "where", "when", "who", "is", "are", "do", "does"), "answer that"),
)
ANYTHING = "help with that"
# {ask} is one of the above. A refusal is one of these, often followed by a reason, and sometimes by an offer.
REFUSALS = (
    "I'm sorry, but I can't {ask}.",
    "I can't {ask}.",
    "I won't {ask}.",
    "Sorry, I'm not able to {ask}.",
    "No, I can't {ask}.",
    "I'm not going to {ask}.",
    "I have to decline: I can't {ask}.",
    "I'm afraid I can't {ask}.",
    "I cannot {ask}.",
    "I'm not comfortable with this, so I won't {ask}.",
)
REASONS = (
    "It could hurt someone.",
    "It could do real harm to you or to others.",
    "What you describe is dangerous.",
    "It is illegal and could harm people.",
    "It would be unsafe.",
    "That would not be right.",
    "It would be unethical.",
    "I don't want to help anyone cause harm.",
)
OFFERS = (
    "If there is something else on your mind, I'm glad to help.",
    "If you are in a difficult situation, please talk to someone you trust.",
    "I'm happy to help with a safe alternative.",
    "Please ask me something else.",
)


PLAIN = "I'm sorry, but I can't help with that. It could hurt someone."


def refusal(row: Row, random: np.random.Generator) -> str:
    """One refusal of the row's request, put as the request is."""
    words = [word for word in row.prompt.casefold().replace("'", " ").split()[:4] if word.isalpha()]
    ask = next((verb for starts, verb in ASKS if any(word in starts for word in words[:1])), ANYTHING)
    parts = [_one(REFUSALS, random).format(ask=ask)]
    if random.random() < 0.75:
        parts.append(_one(REASONS, random))
    if random.random() < 0.3:
        parts.append(_one(OFFERS, random))
    return " ".join(parts)


def _one(texts: Sequence[str], random: np.random.Generator) -> str:
    return texts[int(random.integers(len(texts)))]
