"""Tells a model's reasoning from its answer: `<think>…</think>` and its relatives, and the channels of gpt-oss.

Open this file to add the marks of another model.
"""

import re
from functools import lru_cache

# (begin, end) of a reasoning block; the begin may be missing, because some chat templates write it into the prompt.
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
_ANY_MARK = tuple(mark for pair in MARKS for mark in pair)
_BLOCKS = [(begin, end, re.compile(rf"{re.escape(begin)}.*?(?:{re.escape(end)}|\Z)", re.DOTALL)) for begin, end in MARKS]
# gpt-oss: <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…, or the same without its special tokens.
_FINAL = re.compile(r"<\|channel\|>final(?:\s*<\|constrain\|>\w+)?<\|message\|>|(?<=[.!?\"'”)\]\s])assistantfinal(?=\S)")
_ANALYSIS = re.compile(r"\s*(?:<\|start\|>assistant)?(?:<\|channel\|>(?:analysis|commentary)|analysis(?=[A-Z\"'“]))")
_SPECIAL = re.compile(r"<\|(?:end|return|start|message|channel|call)\|>(?:assistant|analysis|commentary)?")


@lru_cache(maxsize=4096)
def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of what a model wrote. Without any mark all of it is the answer; reasoning that never ends leaves none."""
    begun = _ANALYSIS.match(text)
    if begun:
        ends = list(_FINAL.finditer(text))
        if ends:
            return _plain(text[begun.end() : ends[-1].start()]), _plain(text[ends[-1].end() :])
        if begun[0].strip().startswith("<|"):
            return _plain(text[begun.end() :]), ""
    if final := re.match(r"\s*(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>", text):
        return "", _plain(text[final.end() :])
    if not any(mark in text for mark in _ANY_MARK):
        return "", text
    thoughts = []
    for begin, end, block in _BLOCKS:
        head, closed, rest = text.partition(end)
        if closed and begin not in head:
            thoughts.append(head)
            text = rest
        thoughts += [found.removeprefix(begin).removesuffix(end) for found in block.findall(text)]
        text = block.sub("", text)
    return "\n".join(thought.strip() for thought in thoughts).strip(), text.strip()


def final_answer(text: str) -> str:
    """What a model wrote without its reasoning."""
    return split_reasoning(text)[1]


def _plain(text: str) -> str:
    return _SPECIAL.sub(" ", text).strip()
