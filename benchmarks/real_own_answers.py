"""The base's own compliant answers to the forget prompts, for training on what it would say itself instead of published answers."""

import json
from dataclasses import replace

from sku_vllm.benchmarks.real_data import RealData
from sku_vllm.benchmarks.real_setup import Setup
from sku_vllm.cli.options import log
from sku_vllm.data import PromptTemplate, Row, read_rows
from sku_vllm.errors import ConfigError
from sku_vllm.evaluate.answers import answer_rows
from sku_vllm.evaluate.opened import InMemory
from sku_vllm.judges import Exchange, judge_of
from sku_vllm.model_spec import ModelSpec
from sku_vllm.output import write_text


def own_answers(setup: Setup, data: RealData) -> list[Row]:
    """The forget rows that the base answers, greedy, with its answers; kept in WORK/own_forget.jsonl (mode 0600).

    Raises:
        ConfigError: it answers none of them.
    """
    file = setup.work / "own_forget.jsonl"
    if file.is_file():
        return read_rows(file, need_response=True)
    config = setup.eval_config()
    model = InMemory(ModelSpec(setup.model, dtype=setup.dtype), config)
    replies = answer_rows(model.backend(), PromptTemplate.of(model.tokenizer), "forget", data.forget, [0.0], config)
    told = [reply.text for (reply,) in replies]
    exchanges = [Exchange(row.prompt, text, forget=True) for row, text in zip(data.forget, told, strict=True)]
    answered = judge_of(["answered"]).judge(exchanges)
    kept = [replace(row, response=text) for row, text, yes in zip(data.forget, told, answered, strict=True) if yes and text]
    log(f"the base answers {len(kept)} of {len(data.forget)} forget prompts; these are trained on")
    if not kept:
        raise ConfigError(f"--base-forget own: the base answers none of {len(data.forget)} forget prompts; leave it out")
    lines = (json.dumps({"messages": list(row.messages), "response": row.response, "id": row.id}) + "\n" for row in kept)
    write_text(file, "".join(lines), mode=0o600)
    return kept
