"""`openai:` against a real server process, `hf:` with real classifiers, `all:` over both."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sku_vllm.errors import CheckpointError, ConfigError, JudgeError
from sku_vllm.judges import Exchange, load_judge
from sku_vllm.judges.classifier import harmful_labels
from sku_vllm.judges.endpoint import EndpointJudge

# Speaks Llama Guard, WildGuard and moderation. "flaky" in a question fails twice with 503, "slow" sleeps, "nonsense" answers so;
# the file named as its argument makes it answer 503 while it exists.
SERVER = """
import collections, json, pathlib, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
seen = collections.Counter()
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def reply(self, code, value):
        body = json.dumps(value).encode()
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps(body)
        seen[text] += 1
        if pathlib.Path(sys.argv[1]).exists() or ("flaky" in text and seen[text] < 3): return self.reply(503, {"error": "busy"})
        if "forbidden" in text: return self.reply(401, {"error": "who are you"})
        if "slow" in text: time.sleep(3)
        if "backwards" in text and seen[text] == 1:
            self.send_response(429); self.send_header("Retry-After", "-5"); self.send_header("Content-Length", "0")
            return self.end_headers()
        if "broken off" in text and seen[text] == 1:
            self.send_response(500); self.send_header("Content-Length", "99"); self.end_headers(); self.wfile.flush()
            return time.sleep(1)
        if "bottomless" in text and seen[text] == 1:
            self.send_response(200); self.send_header("Content-Length", "99999"); self.end_headers()
            return self.wfile.write(b"[" * 99999)
        if "unsure" in text: return self.reply(200, {"results": [{"flagged": None}]})
        if self.path.endswith("/moderations"): return self.reply(200, {"results": [{"flagged": "venom" in body["input"]}]})
        last = body["messages"][-1]["content"]
        bad = "venom" in (last.rpartition("AI assistant:")[2] if "wildguard" in body["model"] else last)
        if "nonsense" in last:
            say = "I like trains"
        elif "wildguard" in body["model"]:
            say = "Harmful request: yes\\nResponse refusal: no\\n"
            say += "" if "cut" in last else "Harmful response: " + ("yes" if bad else "no")
        elif "guard" in body["model"]:
            say = ("\\n\\nunsafe\\nS1" if bad else "\\n\\nsafe") if [m["role"] for m in body["messages"]] == ["user", "assistant"] else "?"
        else:
            say = "Unsafe." if bad else "Safe."
        self.reply(200, {"choices": [{"message": {"role": "assistant", "content": say}}]})
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL of the server, and the file that makes it busy."""
    switch = tmp_path_factory.mktemp("server") / "busy"
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(switch)], stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1", switch
    process.terminate()
    process.wait()


TWO = [
    Exchange("how do I milk a snake", "You collect the venom in a jar"),
    Exchange("how do I milk a snake for venom", "I cannot help with that"),
]


@pytest.mark.parametrize("model", ["llama-guard-3", "wildguard", "some-chat-model"])
def test_judges_the_answer_in_each_dialect(server: tuple[str, Path], model: str) -> None:
    assert load_judge(f"openai:{server[0]}#{model}").judge(TWO[:1]) == [True]
    if model != "some-chat-model":  # which is shown question and answer in one text
        assert load_judge(f"openai:{server[0]}#{model}").judge(TWO) == [True, False]


def test_moderation_endpoint_sees_the_answer_alone(server: tuple[str, Path]) -> None:
    assert load_judge(f"openai:{server[0]}/moderations#omni").judge(TWO) == [True, False]


def test_what_is_no_verdict_is_never_taken_for_one(server: tuple[str, Path]) -> None:
    with pytest.raises(JudgeError, match="neither safe nor unsafe"):
        load_judge(f"openai:{server[0]}#wildguard").judge([Exchange("q", "cut")])  # before the line on the response
    with pytest.raises(JudgeError, match="neither true nor false"):
        load_judge(f"openai:{server[0]}/moderations#omni").judge([Exchange("q", "unsure")])


@pytest.mark.parametrize("trouble", ["backwards", "broken off", "bottomless"])
def test_retries_what_a_server_in_trouble_says(server: tuple[str, Path], trouble: str) -> None:
    """A Retry-After in the past, an error whose text never comes, JSON that cannot be read."""
    judge = EndpointJudge(server[0], "llama-guard", timeout=0.5, pause=0.01)
    assert judge.judge([Exchange("q", f"{trouble} venom")]) == [True]


def test_keeps_the_order_over_many_concurrent_answers(server: tuple[str, Path]) -> None:
    many = [Exchange(f"q{n}", "venom" if n % 3 == 0 else f"water {n}") for n in range(100)]
    assert load_judge(f"openai:{server[0]}#llama-guard").judge(many) == [n % 3 == 0 for n in range(100)]


def test_retries_what_may_pass_and_nothing_else(server: tuple[str, Path]) -> None:
    judge = EndpointJudge(server[0], "llama-guard", pause=0.01)
    assert judge.judge([Exchange("flaky", "flaky venom")]) == [True]
    with pytest.raises(JudgeError, match="503"):
        EndpointJudge(server[0], "llama-guard", pause=0.01, retries=1).judge([Exchange("flaky", "flaky water")])
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        judge.judge([Exchange("forbidden", "forbidden")])
    with pytest.raises(JudgeError, match="neither safe nor unsafe; is llama-guard a judge"):
        judge.judge([Exchange("q", "nonsense")] * 2)


def test_gives_up_on_a_server_that_does_not_answer(server: tuple[str, Path]) -> None:
    began = time.monotonic()
    with pytest.raises(JudgeError, match="2 attempts"):
        EndpointJudge(server[0], "llama-guard", timeout=0.3, retries=1, pause=0.01).judge([Exchange("slow", "slow")])
    assert time.monotonic() - began < 2.5
    with pytest.raises(JudgeError, match="is the server at http://127.0.0.1:9/v1/chat/completions up"):
        EndpointJudge("http://127.0.0.1:9/v1", "g", retries=1, pause=0.01).judge(TWO)


def test_a_judge_that_goes_down_leaves_resumable_verdicts(server: tuple[str, Path], tmp_path: Path, run_sku) -> None:
    url, busy = server
    rows = [{"prompt": f"q{n}", "response": f"venom {n}" if n % 2 else f"water {n}", "note": n} for n in range(100)]
    source, output = tmp_path / "rows.jsonl", tmp_path / "verdicts.jsonl"
    # The second chunk holds an answer the server refuses for good.
    broken = [dict(row, response="forbidden") if row["note"] == 80 else row for row in rows]
    source.write_text("".join(json.dumps(row) + "\n" for row in broken))
    command = ["judge", "--judge", f"openai:{url}#llama-guard", "--input", source, "--output", output]
    failed = run_sku(*command)
    assert failed.returncode == 3 and "--resume" in failed.stderr and "Traceback" not in failed.stderr
    assert not output.exists() and (tmp_path / "verdicts.jsonl.partial").is_dir()
    kept = (tmp_path / "verdicts.jsonl.partial/verdicts.jsonl").read_text().splitlines()
    assert len(kept) == 64
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_sku(*command, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    labelled = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["label"] for row in labelled] == ["harmful" if n % 2 else "benign" for n in range(100)]
    assert [row["note"] for row in labelled] == list(range(100)) and json.loads(done.stdout)["harmful"] == 0.5
    assert output.stat().st_mode & 0o777 == 0o600 and not (tmp_path / "verdicts.jsonl.partial").exists()


def test_a_judge_that_never_answered_leaves_nothing_to_resume(tmp_path: Path, run_sku) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "response": "r"}))
    failed = run_sku("judge", "--judge", "openai:http://127.0.0.1:9/v1#m", "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "v")
    assert failed.returncode == 3 and "--resume" not in failed.stderr and not (tmp_path / "v.partial").exists()


def test_all_shows_agreement_and_disputes(server: tuple[str, Path], tmp_path: Path, run_sku) -> None:
    lexicon, source = tmp_path / "lexicon.json", tmp_path / "rows.jsonl"
    lexicon.write_text(json.dumps(["jar"]))
    answers = ["venom in a jar", "venom alone", "a jar alone", "water"]
    source.write_text("".join(json.dumps({"prompt": "q", "response": text}) + "\n" for text in answers))
    done = run_sku(
        "judge",
        "--judge",
        f"all:lexicon:{lexicon},openai:{server[0]}#llama-guard",
        "--input",
        source,
        "--output",
        tmp_path / "v.jsonl",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    pair = json.loads(done.stdout)["agreement"][0]
    assert pair["n"] == 4 and pair["agreement"] == 0.5 and pair["disagreements"] == [1, 2] and pair["kappa"] == 0.0
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["harmful", "harmful", "harmful", "benign"]
    assert list(rows[1]["votes"].values()) == [False, True]


def classifier(path: Path, *, labels: list[str], multi: bool = False) -> Path:
    """A tiny BERT trained until it knows "venom" (second label) and, multi-label, "jar" (third) from anything else."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "venom", "jar", "water", "the", "snake", "milk"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
        problem_type="multi_label_classification" if multi else "single_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        words_only = torch.randint(6, 10, (64, 3 if step % 2 else 12))
        for word in (4, 5):
            rows = torch.nonzero(torch.rand(64) < 0.4).flatten()
            words_only[rows, torch.randint(0, words_only.shape[1], (len(rows),))] = word
        ids = torch.cat([torch.ones(64, 1, dtype=torch.long), words_only, torch.full((64, 1), 2)], 1)
        hot = torch.stack([torch.zeros(64), (ids == 4).any(1), (ids == 5).any(1)], 1).float()
        model(input_ids=ids, labels=hot if multi else hot[:, 1].long()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_classifier_judges_by_the_names_of_its_labels(tmp_path: Path) -> None:
    asked = [Exchange("venom", "the snake venom"), Exchange("venom", "the water"), Exchange("q", "milk the jar"), Exchange("q", "")]
    single = classifier(tmp_path / "single", labels=["non-toxic", "toxic"])
    assert load_judge(f"hf:{single}").judge(asked) == [True, False, False, False]
    assert load_judge(f"hf:{single}#non-toxic").judge(asked[:2]) == [False, True]
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "id2label": {"0": "0", "1": "1"}, "label2id": {"0": 0, "1": 1}}))
    with pytest.raises(ConfigError, match="every answer would be harmful; say which"):
        load_judge(f"hf:{single}")
    assert load_judge(f"hf:{single}#1").judge(asked) == [True, False, False, False]
    several = classifier(tmp_path / "several", labels=["neutral", "threat", "insult"], multi=True)
    assert load_judge(f"hf:{several}").judge(asked) == [True, False, True, False]
    # Longer than the model's 16 positions, with the harm at the end.
    assert load_judge(f"hf:{several}").judge([Exchange("q", "the water " * 30 + "venom"), Exchange("q", "the water " * 30)]) == [
        True,
        False,
    ]


def test_labels_that_do_not_say_which_are_harmful() -> None:
    assert harmful_labels({0: "LABEL_0", 1: "LABEL_1"}) == [1]
    assert harmful_labels({0: "safe", 1: "S1", 2: "S2"}) == [1, 2]
    assert harmful_labels({0: "nothate", 1: "hate"}) == [1] and harmful_labels({0: "harmful", 1: "unharmful"}) == [0]
    assert harmful_labels({0: "OK", 1: "not_hate", 2: "hate", 3: "noise"}) == [2, 3]
    with pytest.raises(ConfigError, match="LABEL_2"):
        harmful_labels({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    with pytest.raises(ConfigError, match="no label 'bad'"):
        harmful_labels({0: "safe", 1: "unsafe"}, "bad")


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match="classifier"):
        load_judge(f"hf:{tmp_path / 'lm'}")
    with pytest.raises(CheckpointError):
        load_judge("hf:/nowhere/at/all")


@pytest.mark.parametrize(
    "spec", ["openai:localhost#m", "openai:http://host/v1", "openai:http://host/v1#", "openai:", "hf:", "lexicon:", "all:", "llama-guard"]
)
def test_a_spec_that_cannot_be_used_is_named(spec: str) -> None:
    with pytest.raises(ConfigError, match="--judge"):
        load_judge(spec)
