"""Turn a row into token ids: the prompt exactly as it is given for generation, then the answer with its end-of-answer token.

Open this file to see what `--template` accepts, and how the text that a chat template writes after an answer is found.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sku_vllm.data.rows import Row
from sku_vllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Liu et al. 2024 (arXiv 2402.10058), the prompt of their released code.
PAPER = "### Question: {prompt}\n ### Answer: {response}"
# An answer that is rendered only to see what a chat template writes after it.
PROBE = "sku0probe"


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row.

    Attributes:
        ids: prompt and answer. answer_start: place of the answer's first token; the answer ends with its terminator.
        cut: whether the answer's end was cut off by a length limit.
    """

    ids: list[int]
    answer_start: int
    cut: bool = False

    @property
    def answer_ids(self) -> list[int]:
        """The answer's tokens, terminator included."""
        return self.ids[self.answer_start :]


class PromptTemplate:
    """Writes prompts and answers the way a model expects them. Make one with `PromptTemplate.of(tokenizer)`.

    Attributes:
        chat: a Jinja chat template, "" for the tokenizer's own; None where `form` is used.
        form: a text with `{prompt}` and `{response}`; "" where a chat template is used.
        bos_ids: tokens the tokenizer puts in front of a text by itself. tail: text that ends an answer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, chat: str | None = None, form: str = "") -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.form = form
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, so answers could never end; "
                'set "eos_token" in its tokenizer_config.json'
            )
        self.bos_ids = self._bos_ids()
        self.tail = self._chat_tail() if chat is not None else self._form_tail()

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> "PromptTemplate":
        """The tokenizer's chat template where it has one, else the paper's question and answer form.

        Args:
            template: overrides both: the word "paper", a text with `{prompt}` (and perhaps `{response}`), a Jinja chat
                template, or a file holding either.

        Raises:
            DataError: a template without `{prompt}` or with it behind `{response}`, or a tokenizer without an end-of-sequence token.
        """
        if template is None:
            return cls(tokenizer, chat="") if tokenizer.chat_template else cls(tokenizer, form=PAPER)
        if "\n" not in template and "{" not in template and _is_file(template):
            template = Path(template).read_text(encoding="utf-8")
        if template == "paper":
            return cls(tokenizer, form=PAPER)
        if "{%" in template or "{{" in template:
            return cls(tokenizer, chat=template)
        if "{prompt}" not in template:
            raise DataError(
                f"--template {template[:60]!r}: expected 'paper', a text with {{prompt}}, a Jinja chat template, or a file with one"
            )
        if "{prompt}" in template.partition("{response}")[2]:
            raise DataError(f"--template {template[:60]!r}: {{prompt}} has to come before {{response}}, or no question would be asked")
        return cls(tokenizer, form=template if "{response}" in template else template + " {response}")

    @property
    def digest(self) -> str:
        """sha256 of the form or chat template in use: whether two models were asked in the same words."""
        own = self.tokenizer.chat_template
        text = self.form or self.chat or (own if isinstance(own, str) else json.dumps(own, sort_keys=True))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's end-of-sequence and the template's own terminator."""
        ends = [self.tokenizer.eos_token_id, *self._encode(self.tail)[-1:]]
        return list(dict.fromkeys(ends))

    def prompt_text(self, row: Row) -> str:
        """The prompt as text, without the special tokens that the tokenizer adds by itself."""
        if self.chat is not None:
            return self._render([*row.messages], row)
        before = self.form.partition("{response}")[0].rstrip(" ")
        return _conversation(self.form, row) + before.replace("{prompt}", row.prompt)

    def prompt_ids(self, row: Row) -> list[int]:
        """The prompt as token ids, a prefix of `encode(row).ids`."""
        return self.bos_ids + self._encode(self.prompt_text(row))

    def encode(self, row: Row, max_length: int | None = None) -> Encoded:
        """Prompt and answer. Beyond `max_length` tokens the answer's end is cut; a prompt alone may exceed it (no answer left).

        Raises:
            DataError: the row has no response.
        """
        if row.response is None:
            raise DataError(f"{_called(row)}: no 'response' to encode")
        prompt = self.prompt_ids(row)
        ids = prompt + self._answer_ids(row, prompt)
        if max_length is not None and len(ids) > max_length:
            return Encoded(ids[: max(max_length, len(prompt))], len(prompt), cut=True)
        return Encoded(ids, len(prompt))

    def _answer_ids(self, row: Row, prompt: list[int]) -> list[int]:
        """The answer's ids: those that follow the prompt where the whole text tokenises that way (SentencePiece writes a word
        differently after a space than alone), else the answer tokenised on its own."""
        before = self.prompt_text(row)
        answer = self._answer_text(row, row.response or "", before)
        whole = self.bos_ids + self._encode(before + answer)
        ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else self._encode(answer)
        return ids + self._encode(self.tail)

    def _answer_text(self, row: Row, response: str, before: str) -> str:
        """What follows the prompt text `before`: the response, with what the template writes in front of it."""
        if self.chat is None:
            return _lead(self.form) + response
        whole = self._render([*row.messages, {"role": "assistant", "content": response}], row, generation=False)
        # Templates may trim the answer or write more in front of it than a generation prompt does.
        for text in (response, response.strip()):
            at = whole.rfind(text)
            if at >= 0 and whole.startswith(before) and at >= len(before):
                return whole[len(before) : at] + text
        return response

    def _chat_tail(self) -> str:
        """What the chat template writes after an answer, up to the first special token; else the end-of-sequence token."""
        row = Row.ask("q")
        whole = self._render([*row.messages, {"role": "assistant", "content": PROBE}], row, generation=False)
        after = whole.rpartition(PROBE)[2]
        ids, special = self._encode(after), set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for count, token in enumerate(ids, 1):
            if token in special:
                return str(self.tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return str(self.tokenizer.eos_token)

    def _form_tail(self) -> str:
        return self.form.partition("{response}")[2] + str(self.tokenizer.eos_token)

    def _render(self, messages: list[dict[str, str]], row: Row, *, generation: bool = True) -> str:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat or None, tokenize=False, add_generation_prompt=generation
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            told = f"the chat template refuses its turns ({roles}): {error}"
            raise DataError(f"{_called(row)}: {told}; leave this row out, or write prompts in another form with --template") from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False)["input_ids"] if text else []

    def _bos_ids(self) -> list[int]:
        """Tokens the tokenizer puts in front of a text by itself (never those it appends); a chat template writes its own."""
        if self.chat is not None:
            return []
        plain = self._encode("a")
        marked = self.tokenizer("a", padding=False, truncation=False)["input_ids"]
        starts = [at for at in range(len(marked) - len(plain) + 1) if marked[at : at + len(plain)] == plain]
        return list(marked[: starts[0]]) if starts else []


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        return False


def _called(row: Row) -> str:
    """How errors name a row: by its id, never by its prompt, which may be harmful."""
    return f"row {row.id!r}" if row.id else "a row without an id"


def _lead(form: str) -> str:
    """The spaces before the answer, which belong to it: BPE tokenizers make them part of its first token."""
    before = form.partition("{response}")[0]
    return before[len(before.rstrip(" ")) :]


def _conversation(form: str, row: Row) -> str:
    """System text and earlier turns in the same form, one block each."""
    blocks, question = [], None
    for message in row.messages[:-1]:
        if message["role"] == "user":
            question = message["content"]
        elif message["role"] == "assistant":
            blocks.append(form.replace("{prompt}", question or "").replace("{response}", message["content"]))
        else:
            blocks.append(message["content"])
    return "".join(block + "\n\n" for block in blocks)
