"""Conversations that a chat template has already written as one text: ChatML, Llama, Gemma, Zephyr, Alpaca.

They are read back into turns, since the model's own template writes them again. Open this file to add a template.
"""

import re

from sku_vllm.data.conversation import SPEAKERS, Turns

# A text is one of these if it begins like one; then every find is a turn: its speaker and what they say.
_TEMPLATES = tuple(
    (re.compile(begin), re.compile(turn, re.DOTALL))
    for begin, turn in (
        (r"<\|im_start\|>\w+\n", r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)"),
        (r"<\|start_header_id\|>\w+", r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*(.*?)(?:<\|eot_id\|>|\Z)"),
        (r"<start_of_turn>\w+\n", r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>|\Z)"),
        (
            r"<\|(?:system|user|assistant)\|>",
            r"<\|(system|user|assistant)\|>\s*(.*?)\s*(?:<\|end\|>|</s>)?\s*(?=<\|(?:system|user|assistant)\|>|\Z)",
        ),
    )
)
_BEGIN = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>)?\s*")
_LLAMA = re.compile(r"\[INST\]\s*(?:<<SYS>>(.*?)<</SYS>>)?(.*?)\[/INST\](.*?)(?=(?:</s>)?\s*(?:<s>)?\s*\[INST\]|</s>|\Z)", re.DOTALL)
_ALPACA = re.compile(
    r"(?:Below is an instruction.*?\n\n)?### Instruction:\s*\n(.*?)(?:\n\n### Input:\s*\n(.*?))?\n\n### (?:Response|Output):(.*)\Z",
    re.DOTALL,
)


def read_marked(text: str) -> Turns | None:
    """The turns of a text in one of these templates, or None for any other text."""
    start = _BEGIN.match(text)
    text = text[start.end() :] if start else text
    if text.startswith("[INST]"):
        return _llama(text)
    if found := _ALPACA.match(text):
        asked = "\n\n".join(part.strip() for part in found.groups()[:2] if part and part.strip())
        return _turns([("user", asked), ("assistant", found[3].replace("</s>", ""))])
    for begin, turn in _TEMPLATES:
        if begin.match(text):
            return _turns(turn.findall(text))
    return None


def _llama(text: str) -> Turns | None:
    said: list[tuple[str, str]] = []
    for system, asked, answer in _LLAMA.findall(text):
        said += [("system", system)] if system.strip() else []
        said += [("user", asked), ("assistant", answer)]
    return _turns(said)


def _turns(said: list[tuple[str, str]]) -> Turns | None:
    """The turns, without an empty last one, where the answer is to follow; None where a speaker is not known."""
    if not all(speaker.casefold() in SPEAKERS for speaker, _ in said):
        return None
    turns = tuple({"role": SPEAKERS[speaker.casefold()], "content": text.strip()} for speaker, text in said)
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]
    return turns or None
