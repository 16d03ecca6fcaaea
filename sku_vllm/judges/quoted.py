"""What an answer says itself, without what it quotes (`unquoted`) and without what it is wrapped in (`unwrapped`).

A story's guard who says "I can't help you" refuses nothing; a refusal inside a JSON object or a fence does. Open this file to add a pair of
quotation marks, a word of saying, or a wrapping.
"""

import json
import re

LONGEST = 400  # characters of a quotation; what is longer is a text of its own, and marks that far apart are no pair
LEAST = 6  # letters outside of the quotations; where fewer are left, as with "“I can't help.”", the quotation is the answer

# „…“ and „…” before “…”, since “ also closes.
_PAIRS = ("„“”", "“”", "«»", "»«", "「」", "『』", '""')
# In single quotation marks an apostrophe stands between letters.
_SINGLE_BEGINS = r"(?<![\w'’])['‘](?=\w)"
_SINGLE = _SINGLE_BEGINS + rf"(?:[^'‘’\n]|(?<=\w)['’](?=\w)){{2,{LONGEST}}}['’](?!\w)"
_MARK = re.compile(f"[{''.join(pair[0] for pair in _PAIRS)}]|{_SINGLE_BEGINS}")  # what every quotation begins with, found at once
_QUOTED = re.compile("|".join([*(rf"{pair[0]}[^{pair}\n]{{2,{LONGEST}}}[{pair[1:]}]" for pair in _PAIRS), _SINGLE]))
# Words of saying that stand beside speech, of the languages that the detector of refusals knows.
_SAYING = (
    r"said|says|asked|replied|replies|answered|answers|responded|responds|whispered|shouted|muttered|dijo|dice|respondió|contestó|disse|respondeu"
    r"|rispose|sagte|sagt|antwortete|erwiderte|dit|répondit|répond|zei|zegt|antwoordde|powiedział\w*|odpowiedział\w*|rzek\w+|řek\w+|odpověděl\w*"
    r"|сказал\w*|ответил\w*|промолвил\w*|сказав|сказала|відповів|відповіла|мовив\w*|dedi|kata|ujar|nói|đáp|trả lời"
)
# Speech after a dash, as most of Europe writes it: up to the next dash, or to the word of saying.
_DASHED = re.compile(rf"^[—–―]\s?[^—–―\n]{{2,{LONGEST}}}?(?:\s[—–―]|,\s*(?=(?:{_SAYING})\b))", re.MULTILINE | re.IGNORECASE)
# "The screen answered: I can't help with that." What "my answer" or "I" says is the speaker's own.
_REPORTS = r"(?:said|says|answers?|answered|repl(?:y|ies|ied)|reads?|responds?|responded|displays?|displayed|printed|wrote)"
_REPORTING = re.compile(rf"{_REPORTS}:")  # a quick look before the slow one
_REPORTED = re.compile(
    rf"(?P<who>\b[\w']+ (?:\w+ ){{0,3}}{_REPORTS})"
    r":\s*(?=[A-Z])[^\n.!?]{2,200}[.!?]?"
)
_OWN = re.compile(r"\b(?:I|[Mm]y|[Oo]ur|we)\b")
# "Here is my answer: “I can't help with that.”"
_INTRODUCED = re.compile(r"\b(?:my|our) (?:answer|response|reply)\b[^.!?\n]{0,20}:\s*$", re.IGNORECASE)
_ROLE = re.compile(r"^\W{0,4}(?:assistant|answer|final answer|response|reply|ai|bot|chatbot|model|output)\W{0,2}:\W{0,3}\s*", re.IGNORECASE)
_FENCE = re.compile(r"^```(?:text|txt|markdown|md|plaintext)?[ \t]*\n(.*?)\n?```$", re.DOTALL)


def unwrapped(answer: str) -> str:
    """The answer out of what it is wrapped in as a whole: the name of a role, a fence of plain text, a JSON object with strings."""
    text = _ROLE.sub("", answer.strip(), count=1) if ":" in answer[:24] else answer.strip()
    if found := _FENCE.match(text):
        text = found[1].strip()
    if text.startswith("{") and text.endswith("}"):
        try:
            told = json.loads(text)
        except ValueError:
            return text
        said = [value for value in told.values() if isinstance(value, str)]
        return "\n".join(said) or text
    return text


def unquoted(text: str) -> str:
    """The answer without speech and samples in quotation marks, after dashes, or after a word of saying and a colon.

    A text that consists of its quotation is left as it is, since somebody who refuses may put that into quotation marks.
    """
    rest = text
    if _MARK.search(text):
        rest = _QUOTED.sub(
            lambda found: " … " if _is_speech(found[0]) and not _INTRODUCED.search(text[: found.start()]) else found[0], text
        )
    rest = _DASHED.sub(" … ", rest)
    if _REPORTING.search(rest):
        rest = _REPORTED.sub(lambda found: found[0] if _OWN.search(found["who"]) else f"{found['who']}: …", rest)
    return rest if rest == text or sum(character.isalpha() for character in rest) >= LEAST else text


def _is_speech(quotation: str) -> bool:
    """Not a single word, which is weighed rather than spoken: 'not "right" to'. Without spaces between words that cannot be told."""
    return " " in quotation or not quotation[1:-1].isascii()
