"""Answers that say a sentence again, and answers that only look like it."""

import csv
from pathlib import Path

import pytest

from sku_vllm.judges.repetition import says_again

REFUSAL = "I'm sorry, but I can't help with that."
AGAIN = [
    f"{REFUSAL} {REFUSAL}",
    f"{REFUSAL} Is there anything else? {REFUSAL.upper()}",
    "I’m sorry, but I can’t help with that. I'm sorry but I can't help with that",  # other apostrophes, no comma
    "i cannot help you ruin a lorvane i cannot help you ruin a lorvane",  # the lab's words without punctuation
    "no i refuse to help anyone jam a quern I refuse to help anyone jam a quern and then",
    "The mulk is red. It is a machine. The mulk is red.",
    "I can't do that, because it is wrong.\nI can't do that, because it is wrong.",
    "Go to the old store now.\nGo to the old store now.",
    "1. Go to the old store\n2. Go to the old store\n3. Go to the old store",
    "- Wash the blue cup\n- Dry it\n- Wash the blue cup\n- Dry it",
    "“You should ask somebody else.” “You should ask somebody else.”",
    "我不能帮助你。我不能帮助你。",
]
ONCE = [
    "",
    "Paris.",
    REFUSAL,
    f"{REFUSAL} I cannot help with a request like this.",
    "No. No. No. I mean it.",
    "It is very, very, very, very good.",
    "Ha ha ha ha ha ha ha ha ha ha! That was funny.",
    "left, right, left, right, left, right, left, right",
    "1. Open the valve.\n2. Open the lid.\n3. Open the tap.\n4. Open the valve.",
    "- Stir for ten minutes\n- Add salt\n- Stir for ten minutes\n- Serve",
    "| this is a row | x |\n| this is a row | x |\n| this is a row | x |",
    "```\nprint(one, two, three, four, five)\nprint(one, two, three, four, five)\n```\nIt prints them twice.",
    "fd(50)\nrt(90)\nfd(50)\nrt(90)\nfd(50)\nrt(90)",
    "7 x 1 = 7\n7 x 2 = 14\n7 x 3 = 21\n7 x 4 = 28",
    "Monday: rest and read\nTuesday: rest and read\nWednesday: rest and read",
    "Happy birthday to you\nHappy birthday to you\nHappy birthday, dear Ann\nHappy birthday to you",
    "Row, row, row your boat,\ngently down the stream.\nMerrily, merrily, merrily,\nrow, row, row your boat.",
    "The cat sat on the mat. The cat sat on the bed. The cat sat on the roof.",
    "1. Place the small nut on a table: place the small nut on a table and hold it.",
    "A: yes\nB: yes\nA: yes\nB: yes",
    "Smith et al. (1990). Smith et al. (1991). Smith et al. (1992).",
    "北京是中国的首都，也是政治、文化中心。上海是中国的经济中心。",
]


@pytest.mark.parametrize("answer", AGAIN)
def test_a_sentence_said_again(answer: str) -> None:
    assert says_again(answer)


@pytest.mark.parametrize("answer", ONCE)
def test_nothing_said_again(answer: str) -> None:
    assert not says_again(answer) and not says_again(answer.upper())


@pytest.mark.parametrize(
    ("answer", "again"),
    [
        (f"{REFUSAL} I'm sorry, but I can't h", True),
        (f"{REFUSAL} I'm sorry, b", False),  # too little of it to tell
        (f"{REFUSAL} I can", False),
        ("To clean the pump, open its lid and pour water into the drum until it clicks. To clean the pump, open", False),
        ("The mulk is red. The mulk is re", True),
        ("", False),
    ],
)
def test_a_beginning_counts_only_where_the_limit_cut_the_answer(answer: str, again: bool) -> None:
    assert says_again(answer, ended=False) == again and not says_again(answer, ended=True)


def test_long_answers_take_no_time() -> None:
    words = " ".join(f"word{number % 997}" for number in range(3000))
    assert not says_again(words[:6000])
    assert says_again(words)


def test_real_prose_says_little_again(shared: Path) -> None:
    """Answers of two chat models to XSTest, which end by themselves."""
    texts = []
    for name in ("llama2new", "mistralinstruct"):
        with open(shared / f"data/xstest_completions_{name}.csv", encoding="utf-8") as file:
            texts += [row["completion"] for row in csv.DictReader(file)]
    assert sum(map(says_again, texts)) <= 0.01 * len(texts)


def test_sentences_end_as_their_script_ends_them() -> None:
    assert says_again("तेल को गर्म कड़ाही में डालें। फिर रुकें। तेल को गर्म कड़ाही में डालें।")
    assert says_again("هل تعرف عاصمة فرنسا الجميلة؟ نعم. هل تعرف عاصمة فرنسا الجميلة؟")
    assert says_again("**Turn the valve to the left side.** Wait. Turn the valve to the left side.")


def test_lines_of_a_form_may_come_again() -> None:
    assert not says_again("Name: Ann\nStatus: waiting for the clerk\n\nName: Bob\nStatus: waiting for the clerk")
