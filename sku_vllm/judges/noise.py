"""Text in no language: mojibake, random letters, words of many scripts in one line, and word salad in English.

Open this file to change a threshold. Each rule looks at what no language does; what a language model finds unlikely is
`sku_vllm.evaluate.likelihood`'s business, where there is a model.
"""

import re
import unicodedata

# What UTF-8 looks like when it is read as Latin-1: "Ã©", "â€™".
_MOJIBAKE = re.compile(r"[ÃÂÐÑ][€\u0080-\u00bf©¨¼±ª«¬®¯°²³´µ¶·¸¹º»½¾¿ƒ‚„…†‡ˆ‰Š‹Œ‘’“”•–—˜™š›œž]|â€[™œ\u009d“”˜¦]?|ð\u009f")
_WORDS = re.compile(r"[^\W\d_]+")
_VOWELS = frozenset("aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýœ")
LEAST = 6  # words that a judgement of letters or order needs
# Pairs of letters that hardly occur inside English, or European, words. Random typing is full of them.
_RARE_PAIR = re.compile(
    "b[qxz]|c[gjvx]|dx|f[gjqvxz]|g[qvxz]|h[jqvxz]|j[b-df-hj-npr-tv-xz]|k[qvxz]|l[qx]|m[qxz]|p[qvxz]|q[a-hj-tv-z]|sx"
    "|v[bcdf-hjkmpqtvwxz]|w[jqvxz]|x[bdgjkmnqrsvwxz]|yq|z[bcdfgjkmnp-tvx]"
)
# Small words of English by the place they take. In a sentence two of one kind hardly stand side by side.
_LINKS = (
    *("the a an", "of in on at by to from with for into", "and or but", "is are was were be", "whose which who whom", "under over"),
    *("unless although because whether whereas", "mostly hardly quite"),
)
_PREPOSITIONS, _SUBORDINATORS = 1, 6  # places among these
_KIND = {word: kind for kind, words in enumerate(_LINKS) for word in words.split()}
_AFTER_ARTICLE = frozenset(
    ("of", "and", "or", "but", "is", "are", "was", "were", "to", "from", "with", "for", "the", "a", "an", "in", "on", "at", "by")
)


def is_noise(text: str) -> bool:
    """Whether a text is none in any language: broken encoding, random letters, a jumble of scripts or of English words."""
    return _mojibake(text) or _random_letters(text) or _many_scripts(text) or _salad(text)


def _mojibake(text: str) -> bool:
    broken = sum(len(found) for found in _MOJIBAKE.findall(text))
    return broken >= 6 and broken > 0.3 * len("".join(text.split()))


def _random_letters(text: str) -> bool:
    """Most of the Latin words have pairs of letters that words do not have, or no vowel, or go on without end; or of the Cyrillic ones."""
    cyrillic = [word.casefold() for word in _WORDS.findall(text) if len(word) > 3 and _script(word) == "CYRILLIC"]
    if len(cyrillic) >= 4 and sum(map(_crowded, cyrillic)) >= max(4, 0.6 * len(cyrillic)):
        return True
    words = [word.casefold() for word in _WORDS.findall(text) if word.isascii()]
    longest = max(words, key=len, default="")
    if len(longest) >= 30 and len(longest) > 0.6 * len(text) and longest in text:
        # No address, name or sequence: those have vowels, capitals or digits.
        return len(_RARE_PAIR.findall(longest)) >= 0.1 * len(longest)
    written = sum(character.isalpha() for character in text)
    if len(words) < 4 or sum(map(len, words)) < max(24, 0.5 * written) or any(mark in text for mark in "{}=;<>"):
        return False
    odd = [word for word in words if len(word) >= 3 and _odd(word)]
    return len(odd) >= 0.6 * sum(len(word) >= 3 for word in words) and len(odd) >= 4


def _crowded(word: str) -> bool:
    """Whether a Cyrillic word has no vowel, five consonants in a row, or a sign where none can stand. ъ is a vowel in Bulgarian."""
    runs = re.split("[аеёиіїоуыъэєюя]", word)
    return len(runs) == 1 or max(map(len, runs)) >= 5 or re.search("^[ьы]|ъъ|ьы|[аеёиоуыэюя]ь", word) is not None


def _odd(word: str) -> bool:
    if word.isupper():
        return False
    vowels = sum(letter in _VOWELS for letter in word)
    longest = max((len(run) for run in re.split(r"[aeiouy]", word)), default=0)
    return _RARE_PAIR.search(word) is not None or (vowels == 0 and len(word) > 3) or longest >= 5


def _many_scripts(text: str) -> bool:
    """Words of three or more scripts that change from one to the next; Japanese and Latin in one text are usual.

    A change counts where only a space is between the words: a list or a gloss ("eau (fr), вода (ru)") has marks there.
    """
    found = list(_WORDS.finditer(text))
    words = [word[0] for word in found]
    if not LEAST <= len(words) <= 400:
        return False
    scripts = [_script(word) for word in words]
    changes = sum(
        scripts[place] != scripts[place - 1] and text[found[place - 1].end() : found[place].start()].isspace()
        for place in range(1, len(words))
    )
    usual = {"CJK", "HIRAGANA", "KATAKANA", "LATIN"}
    return len(set(scripts)) >= 3 and not set(scripts) <= usual and changes > 0.5 * len(words)


def _script(word: str) -> str:
    return unicodedata.name(word[0], "OTHER").split()[0]


def _salad(text: str) -> bool:
    """A line of English words in no order: small words where none of their kind can stand, and no sentence."""
    words = [word.casefold() for word in _WORDS.findall(text)]
    if not LEAST <= len(words) <= 60 or not text.isascii() or re.search(r"[.!?:,;\n|=(){}<>\"]", text.strip().rstrip(".!?")):
        return False
    if sum(len(word) == 1 for word in words) > 0.5 * len(words):
        return False  # letters one by one: notes, a sequence
    faults = 0
    for one, other in zip(words, [*words[1:], ""], strict=True):
        same = one in _KIND and other in _KIND and _KIND[one] == _KIND[other] and one != other
        faults += same or (one in ("the", "a", "an") and (other in _AFTER_ARTICLE or not other))
        faults += (one in ("of", "and", "under", "over") and other in ("whose", "and", "or", "is", "are", "")) or (
            one == "whose" and other in _KIND
        )
        faults += (
            one == other and one in _KIND and _KIND[one] not in (_PREPOSITIONS, _SUBORDINATORS)
        )  # "the the"; "the room he is in in May" is one
        faults += _KIND.get(one) == _SUBORDINATORS and other in ("whose", "of", "and", "or", "is", "are", "were", "was", "yes", "")
        faults += one in ("running", "being") and other in ("the", "of") and words[max(0, words.index(one) - 1)] in ("whose", "of", "the")
    return faults >= 2
