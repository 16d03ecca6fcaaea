"""The answer mask, against a token-by-token hand count for a BPE, a word-level and a left-padding tokenizer."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sku_vllm.data import PromptTemplate, Row
from sku_vllm.errors import DataError

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROW = Row.ask("how are you", "fine hello")


def bpe(**options: object) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    text = "### Question: how are you\n ### Answer: fine hello user assistant system"
    inner.train_from_iterator([text] * 5, trainers.BpeTrainer(special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", **options)


def words(**options: object) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(
        ["### Question : Answer hello how are you fine a"], trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", **options)


def left_padding() -> PreTrainedTokenizerFast:
    """Adds <s> in front and </s> behind by itself, pads and truncates on the left by default, and pads with the end token."""
    tokenizer = words(pad_token="</s>", padding_side="left", truncation_side="left", model_max_length=8)
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    inner.enable_padding(direction="left", length=30, pad_id=2, pad_token="</s>")
    inner.enable_truncation(8)
    return tokenizer


HAND_COUNTED = {
    "bpe": (bpe, ["###", "ĠQuestion", ":", "Ġhow", "Ġare", "Ġyou", "Ċ", "Ġ###", "ĠAnswer", ":"], ["Ġfine", "Ġhello", "</s>"]),
    "word-level": (words, ["###", "Question", ":", "how", "are", "you", "###", "Answer", ":"], ["fine", "hello", "</s>"]),
    "left-padding": (left_padding, ["<s>", "###", "Question", ":", "how", "are", "you", "###", "Answer", ":"], ["fine", "hello", "</s>"]),
}


@pytest.mark.parametrize("kind", HAND_COUNTED)
def test_prompt_and_answer_tokens_as_counted_by_hand(kind: str) -> None:
    make, prompt, answer = HAND_COUNTED[kind]
    tokenizer = make()
    template = PromptTemplate.of(tokenizer)
    encoded = template.encode(ROW)
    assert tokenizer.convert_ids_to_tokens(encoded.ids[: encoded.answer_start]) == prompt
    assert tokenizer.convert_ids_to_tokens(encoded.answer_ids) == answer
    assert template.prompt_ids(ROW) == encoded.ids[: encoded.answer_start]
    assert template.stop_ids == [tokenizer.eos_token_id]


def test_chat_template_terminator_and_turns() -> None:
    tokenizer = bpe()
    tokenizer.chat_template = CHATML
    template = PromptTemplate.of(tokenizer)
    turns = (
        {"role": "system", "content": "hello"},
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "you"},
    )
    row = Row(turns, " fine hello ")
    generated = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False)
    encoded = template.encode(row)
    assert encoded.ids[: encoded.answer_start] == generated == template.prompt_ids(row)
    # The template trims the answer and ends it with <|im_end|>; the newline after that belongs to nobody's answer.
    assert tokenizer.decode(encoded.answer_ids) == "fine hello<|im_end|>"
    assert template.stop_ids == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    with pytest.raises(DataError, match="row 'r7'.*no tools here"):
        template.encode(Row(({"role": "tool", "content": "x"}, {"role": "user", "content": "y"}), "z", id="r7"))


def test_a_template_that_would_ask_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"\{prompt\} has to come before \{response\}"):
        PromptTemplate.of(bpe(), "A: {response} Q: {prompt}")


def test_an_error_never_says_what_was_asked() -> None:
    template = PromptTemplate.of(bpe(chat_template=CHATML))
    row = Row(({"role": "tool", "content": "zorbium"}, {"role": "user", "content": "zorbium"}), "fine")
    for given, name in ((row, "a row without an id"), (replace(row, id="7"), "row '7'")):
        with pytest.raises(DataError, match=rf"{name}: the chat template refuses its turns \(tool, user\): no tools here") as caught:
            template.prompt_text(given)
        assert "zorbium" not in str(caught.value)


def test_paper_form_of_a_conversation() -> None:
    template = PromptTemplate.of(bpe(), "paper")
    turns = (
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    assert template.prompt_text(Row(turns)) == "S\n\n### Question: a\n ### Answer: b\n\n### Question: c\n ### Answer:"


@pytest.mark.parametrize("as_file", [False, True])
def test_templates_of_ones_own(tmp_path_factory: pytest.TempPathFactory, as_file: bool) -> None:
    tokenizer, text = bpe(), "Q: {prompt} A: {response}"
    if as_file:
        path = tmp_path_factory.mktemp("t") / "form.txt"
        path.write_text(text)
    encoded = PromptTemplate.of(tokenizer, str(path) if as_file else text).encode(ROW)
    assert tokenizer.decode(encoded.ids[: encoded.answer_start]) == "Q: how are you A:"
    assert tokenizer.decode(encoded.answer_ids) == " fine hello</s>"
    assert PromptTemplate.of(tokenizer, CHATML).prompt_text(ROW).endswith("assistant\n")
    with pytest.raises(DataError, match="--template"):
        PromptTemplate.of(tokenizer, "no place for it")


def test_length_limit_cuts_only_the_answer() -> None:
    template = PromptTemplate.of(words())
    whole = template.encode(ROW)
    cut = template.encode(ROW, len(whole.ids) - 2)
    assert cut.cut and cut.ids == whole.ids[:-2] and cut.answer_start == whole.answer_start and not whole.cut
    assert template.encode(ROW, 3).ids == template.prompt_ids(ROW)


def test_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = words()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        PromptTemplate.of(tokenizer)
