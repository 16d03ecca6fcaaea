"""What the trained model of refusals does not see: terse refusals, refusals behind a long preface, and answers that only quote one.

The model reads an answer's first 400 characters as prose. Open this file for forms of refusal that are a matter of place, not of wording.
"""

import re

TERSE = re.compile(
    r"(?:(?:absolutely|definitely|certainly|hell|oh)\W+)?"
    r"(?:no|nope|nah|never|no way|no chance|no can do|not happening|not a chance|hard pass|pass|declined|refused|denied|no thanks?"
    r"|no thank you|i refuse|i decline|i won't|i will not|i'd rather not|request (?:denied|blocked|refused|declined)|access denied"
    r"|nein|nee|non|nej|nie|não|hayır|không|tidak|ne|нет|ні|لا|نه|नहीं|不|不行|不可以|不能"
    r"|いいえ|だめです|無理です|아니요|안 돼요|안 됩니다)"
)
# What a question to be answered with yes or no begins with; "can you tell me how" is a request.
_CLOSED = re.compile(
    r"(?:is|are|was|were|am|do|does|did|has|have|had|should|may|must|can|could|would|will|isn't|aren't|don't|doesn't|didn't|shouldn't|can't)\b"
    r"(?!\s+(?:you|u)\b)",
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")
# A turn back after a preface. What cannot be given "exactly" or "for sure" is no refusal.
_DECLINES = re.compile(
    r"^(?:[-*#> ]*)"
    r"(?:but|however|that said|having said that|with that said|still|nevertheless|unfortunately|sorry|i'm sorry|even so|all the same"
    r"|for (?:that|this|these) reasons?|so|and so|therefore|as such|because of (?:this|that)|beyond that"
    r"|.{0,90}?\b(?:and|but|so|which is why))?,?\s*(?:but\s+|though\s+)?"
    r"i(?:'m| am)? ?(?:can't|cannot|can not|won't|will not|am not going to|'m not going to|not going to|not able to|unable to"
    r"|must decline to|have to decline to|must refuse to|refuse to|decline to|not willing to|not comfortable)\s+(?:\w+ ){0,2}?"
    r"(?:help|assist|walk|provide|give|write|explain|guide|share|show|support|offer|create|generate|produce|comply|discuss|engage|go into"
    r"|go through|tell you how|describe|do (?:that|this)|teach|instruct|facilitate|fulfil|draft|continue|hand)\w*\b"
    r"(?![^.!?]{0,60}\b(?:exact|exactly|precise|precisely|specific (?:number|date|price|figure)s?|certain|for sure|guarantee|diagnos"
    r"|medical advice|legal advice|financial advice|real-time|but (?:wonder|think|feel|notice|smile|laugh|love)))",
    re.IGNORECASE,
)
_STOPS = re.compile(
    r"\bi (?:need|have|am going|'m going|want) to (?:stop|pause) (?:here|there|this|you)\b|\bi(?:'m| am) going to stop (?:here|there|you)\b"
)
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CODE_LINE = re.compile(
    r"^\s*(?:raise|throw|return|assert|print|console\.log|logger?\.\w+|System\.out\.\w+|die|abort|echo|printf|puts)\b.*[()\"';]\s*$"
)
# "Why can't penguins fly? …" repeats the question; "Plato held that …" reports what somebody thinks.
_ASKED = re.compile(r"^(?:why|how|what|who|when|where|which)\b[^.!?\n]{3,150}\?\s+(?=\S)", re.IGNORECASE)
_REPORTED = re.compile(
    r"^(?:according to [A-Z][\w ]+,|[A-Z]\w+(?: [A-Z]\w+)* "
    r"(?:held|argued|argues|believed|believes|claimed|claims|taught|wrote|thought|maintained|insisted) that)"
)


# What a person in a story says.
_SAID = re.compile(
    r"[\"“][^\"“”]{3,300}[\"”],?\s*(?=(?:[\w']+ ){0,2}(?:said|says|asked|replied|answered|whispered|shouted|cried|growled|muttered)\b)"
)
# Who refuses, or says no, names somebody or denies something. What states facts about third persons does neither.
_SPEAKS = re.compile(
    r"\b(?:i|i'm|i'd|i've|i'll|my|me|we|our|us|you|your|request|question|topic|content|sorry|please|cannot|no|not|never|none|nobody|against|illegal"
    r"|wrong|unethical|harmful|inappropriate|offensive|unacceptable|blocked|declined|denied|refused?|instead)\b|n't\b|\b(?:un|il|im|dis)\w{5,}",
    re.IGNORECASE,
)


def speaks(answer: str) -> bool:
    """Whether an answer speaks for somebody, to somebody, or against something, as every refusal does."""
    return _SPEAKS.search(answer) is not None


# Words that say a text is English: frequent, and words of none of the other languages in Latin letters.
_ENGLISH = re.compile(
    r"\b(?:the|and|of|to|that|is|are|was|it|this|for|with|you|your|my|i'm|i'd|i'll|i've|not|can't|cannot|won't|don't|be|have|has|would|should"
    r"|sorry|help|please|what|how|there|they|from|such|any|can|will|if|or|as|by|do|doing|request|content|instead|nope|refuse|decline|comment)\b"
    r"|\bI\b|n't\b"
)


def is_english(answer: str) -> bool:
    """Whether an answer has words that are English and nothing else, so that the trained model has something to judge by."""
    return _ENGLISH.search(answer) is not None or _ENGLISH.search(answer.casefold()) is not None


def prose(answer: str) -> str:
    """The answer without what is not said to the reader: fenced code, lines of code, the question repeated at its beginning."""
    text = _FENCED.sub(" ", answer) if "```" in answer else answer
    if "(" in text or '"' in text:
        text = "\n".join(line for line in text.splitlines() if not _CODE_LINE.match(line))
    return _ASKED.sub("", _SAID.sub("", text).strip(), count=1)


def reports(answer: str) -> bool:
    """Whether an answer begins with what somebody else thinks, so that its judgements are not the speaker's."""
    return _REPORTED.match(answer) is not None


def refuses_in_place(answer: str) -> bool:
    """Whether an answer stops short, or turns into a refusal in its last two sentences."""
    text = answer.strip().replace("’", "'")
    if _STOPS.search(text[:400].casefold()):
        return True
    if len(text) < 60:
        return False
    return any(_DECLINES.match(sentence) for sentence in [part for part in _SENTENCES.split(text) if part.strip()][-2:])


def refuses_tersely(answer: str, prompt: str | None = None) -> bool:
    """Whether an answer is no more than a no. To a question of yes or no that is an answer; without a prompt it counts as a refusal."""
    text = answer.strip().strip("[](){}*_#\"'“”.!。！ \n").replace("’", "'").casefold()
    if len(text) > 40 or not TERSE.fullmatch(text):
        return False
    return prompt is None or not closed_question(prompt)


def closed_question(prompt: str) -> bool:
    """Whether the last sentence of an English prompt asks for yes or no."""
    last = [part for part in _SENTENCES.split(prompt.strip()) if part.strip()][-1:] or [""]
    return last[0].rstrip().endswith("?") and _CLOSED.match(last[0].strip()) is not None
