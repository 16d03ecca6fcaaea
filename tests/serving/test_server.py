"""Everything a client or an operator can do to a running server, on one real vLLM engine."""

import concurrent.futures
import json
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from sku_vllm.errors import RunError

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import eventually, frozen  # noqa: E402

TIMEOUT = 300  # seconds for one answer: a busy machine is slow, which is no failure
TOKEN = {"X-SKU-Token": "open sesame"}
PROMPTS = [f"w{number} w{number + 17} w{3 * number + 1}" for number in range(24)]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


@pytest.fixture(autouse=True)
def in_order(served):
    """Every test leaves the server as it found it: no swap, both arms at half, the adapter at scale 1."""
    yield
    if served.control("GET", "status")["swap"]:
        served.control("POST", "restore")
    arms = served.control("GET", "arms")["arms"]
    if arms["negated"]["spec"].rpartition("@")[2] != "1":
        served.control("PUT", "arms/negated", {"spec": arms["negated"]["spec"].rpartition("@")[0] + "@1"})
    served.control("PUT", "weights", {"weights": {"original": 0.5, "negated": 0.5}})


def say(client, prompt, *, model="sku", stream=False, tokens=8, **headers):
    """(arm, text) of one greedy chat."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=tokens, temperature=0, stream=stream, extra_headers=headers
    )
    if not stream:
        parsed = reply.parse()
        assert parsed.model == "sku"
        return reply.headers.get("x-sku-arm"), parsed.choices[0].message.content
    return reply.headers.get("x-sku-arm"), "".join(chunk.choices[0].delta.content or "" for chunk in reply.parse() if chunk.choices)


def by_arm(client, arm, prompt, **options):
    found, text = say(client, prompt, X_SKU_Arm=arm, X_SKU_Token=TOKEN["X-SKU-Token"], **options)
    assert found == arm
    return text


def test_both_arms_answer_streaming_and_not(client, tiny):
    """Through the alias each key gets its arm, and that arm's own answer."""
    arms = {}
    for number, prompt in enumerate(PROMPTS[:12]):
        arm, text = say(client, prompt, X_SKU_Key=f"user-{number}")
        assert (arm, text) == say(client, prompt, stream=True, X_SKU_Key=f"user-{number}")
        assert text == by_arm(client, arm, prompt)
        arms.setdefault(arm, []).append(prompt)
    assert set(arms) == {"original", "negated"}
    different = [prompt for prompt in PROMPTS if by_arm(client, "original", prompt) != by_arm(client, "negated", prompt)]
    assert len(different) > len(PROMPTS) / 2


def test_the_negated_arm_is_base_minus_delta(client, tiny):
    """vLLM's greedy answers equal transformers' on weights merged by PEFT with the sign flipped, in a batch mixed with base rows."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.float32), tiny / "adapter").eval()

    def greedy(prompt, sign):
        for _, module in model.named_modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = sign * 2.0
        ids = tokenizer(prompt + " ", return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode(out, skip_special_tokens=True)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = [(arm, prompt) for prompt in PROMPTS for arm in ("original", "negated")]
        answers = list(pool.map(lambda each: by_arm(client, *each), asked))
    right = dict.fromkeys(("original", "negated"), 0)
    for (arm, prompt), text in zip(asked, answers, strict=True):
        right[arm] += text.split() == greedy(prompt, {"original": 0.0, "negated": -1.0}[arm]).split()
    assert right == {"original": len(PROMPTS), "negated": len(PROMPTS)}


def test_a_client_cannot_choose_an_arm(client, served, tiny):
    for model in ("original", "negated", str(tiny / "base"), "base", "sku-negated-1000001"):
        with pytest.raises(openai.NotFoundError):
            say(client, "w1", model=model)
    for headers in ({"X_SKU_Arm": "original"}, {"X_SKU_Arm": "original", "X_SKU_Token": "wrong"}, {"X_SKU_Arm": "no-such"}):
        with pytest.raises(openai.PermissionDeniedError):
            say(client, "w1", **headers)
    with pytest.raises(openai.BadRequestError, match="unknown arm"):
        say(client, "w1", X_SKU_Arm="no-such", X_SKU_Token=TOKEN["X-SKU-Token"])
    assert [model.id for model in client.models.list().data] == ["sku"]
    served.control("PUT", "weights", {"weights": {"negated": 1.0}})
    # vLLM serves the base to a request without `model`; here it goes through the split like any other
    for body in ({}, {"model": None}, {"model": ""}):
        reply = httpx.post(f"{served.url}/completions", json={**body, "prompt": "w1 w2", "max_tokens": 2}, timeout=TIMEOUT)
        assert reply.status_code == 200 and reply.headers["x-sku-arm"] == "negated"


def test_endpoints_that_are_not_routed_do_not_reach_the_model(served):
    """Every POST route of this vLLM, with a body that would make it generate: none answers with the original's text."""
    paths = [
        path
        for path, methods in httpx.get(f"{served.root}/openapi.json", timeout=TIMEOUT).json()["paths"].items()
        if "post" in methods and "/sku/" not in path
    ]
    assert "/v1/chat/completions" in paths
    served.control("PUT", "weights", {"weights": {"negated": 1.0}})
    body = {
        "model": "sku",
        "prompt": "w1 w2",
        "messages": [{"role": "user", "content": "w1 w2"}],
        "input": "w1 w2",
        "token_ids": [5, 6],
        "max_tokens": 4,
        "sampling_params": {"max_tokens": 4},
        "text_1": "w1",
        "text_2": "w2",
        "queries": "w1",
        "documents": ["w2"],
    }
    before = served.metric("sku_requests_total", arm="original")
    for path in paths:
        reply = httpx.post(f"{served.root}{path}", json=body, timeout=TIMEOUT)
        assert reply.headers.get("x-sku-arm", "negated") == "negated", path
    assert served.metric("sku_requests_total", arm="original") == before


def test_malformed_and_large_bodies_get_vllms_own_answer(served, client):
    url = f"{served.url}/chat/completions"
    for body in (b"{", b"", b"[1]", b"\xff\xfe", b'{"messages": 3}', b"[" * 100_000):
        reply = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=TIMEOUT)
        assert reply.status_code in (400, 422) and reply.json(), (body[:20], reply.status_code)
    reply = httpx.post(url, json={"model": "sku", "messages": [{"role": "user", "content": "w1 " * 3_500_000}]}, timeout=TIMEOUT)
    assert reply.status_code == 400 and "context length" in reply.text
    assert say(client, "w1 w2")[1]


def test_a_client_cannot_end_the_engine_by_asking_for_prompt_scores(served, client):
    """On CPU with adapters vLLM dies of prompt log-probabilities in a mixed batch; they are refused, and ordinary ones work."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(say, client, prompt, tokens=60) for prompt in PROMPTS[:6]]
        for body in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}):
            asked = {"model": "sku", "prompt": "w1 w2 w3", "max_tokens": 2, **body}
            reply = httpx.post(f"{served.url}/completions", json=asked, timeout=TIMEOUT)
            assert reply.status_code == 400 and "prompt_logprobs" in reply.text
        assert all(each.result()[1] for each in busy)
    reply = client.completions.create(model="sku", prompt="w1 w2", max_tokens=2, logprobs=3)
    assert len(reply.choices[0].logprobs.token_logprobs) == 2


def test_several_choices_and_prompts_are_each_judged(client, served):
    wait_judged(served)
    before = {name: served.metric(name) for name in ("sku_requests_total", "sku_judged_total", "sku_generation_tokens_total")}
    reply = client.completions.create(model="sku", prompt=["w1 w2", "w3 w4"], n=3, max_tokens=5, temperature=1.0)
    assert len(reply.choices) == 6
    stream = client.chat.completions.create(
        model="sku", messages=[{"role": "user", "content": "w5"}], n=2, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    usage = [chunk.usage for chunk in stream if chunk.usage][-1]
    tokens = reply.usage.completion_tokens + usage.completion_tokens
    wait_judged(served)
    assert served.metric("sku_requests_total") - before["sku_requests_total"] == 3
    assert served.metric("sku_judged_total") - before["sku_judged_total"] == 8
    assert served.metric("sku_generation_tokens_total") - before["sku_generation_tokens_total"] == tokens


TIMES = ("inter_token_latency", "decode", "request_latency", "time_to_first_token")


def times_of(served):
    """{name: seconds observed so far, all arms together}."""
    return {name: served.metric(f"sku_{name}_seconds_sum") for name in TIMES}


def test_every_gap_between_tokens_is_counted_streamed_or_not(client, served):
    def gaps(**options):
        """(gaps counted, {name: seconds}, seconds on this side's clock) of one request."""
        counted, before = served.metric("sku_inter_token_latency_seconds_count"), times_of(served)
        start = time.perf_counter()
        reply = client.completions.create(model="sku", prompt="w1 w2", max_tokens=12, extra_body={"ignore_eos": True}, **options)
        if options.get("stream"):
            list(reply)
        outside = time.perf_counter() - start
        seconds = {name: value - before[name] for name, value in times_of(served).items()}
        return served.metric("sku_inter_token_latency_seconds_count") - counted, seconds, outside

    count, seconds, _ = gaps()
    assert count == 11 and seconds["inter_token_latency"] == pytest.approx(seconds["decode"], rel=0.01)
    count, seconds, outside = gaps(stream=True)
    # In a stream the gaps are those the client saw, and decoding is the engine's: whichever is longer lies between first and last token.
    between = seconds["request_latency"] - seconds["time_to_first_token"]
    assert count == 11 and max(seconds["inter_token_latency"], seconds["decode"]) == pytest.approx(between, rel=0.01)
    assert 0 < seconds["inter_token_latency"] <= outside and 0 < seconds["decode"] <= outside
    assert gaps(stream=True, n=2)[0] == gaps(n=2)[0] == 22


def test_beam_search_is_one_request_whose_answers_are_judged(client, served):
    wait_judged(served)
    before = {name: served.metric(name) for name in ("sku_requests_total", "sku_judged_total", "sku_generation_tokens_total")}
    reply = client.completions.create(model="sku", prompt="w1 w2", n=2, max_tokens=4, extra_body={"use_beam_search": True})
    assert len(reply.choices) == 2
    expected = {"sku_requests_total": 1, "sku_judged_total": 2, "sku_generation_tokens_total": reply.usage.completion_tokens}
    # a search is counted when its answer is out, so that the client may know it a moment earlier
    assert eventually(lambda: {name: served.metric(name) - value for name, value in before.items()} == expected)


def test_the_judge_may_be_killed(client, served):
    """Its process is another one than the server's; the next answers start a new one."""
    (judge,) = [
        each for each in psutil.Process(served.process.pid).children(recursive=True) if "sku_vllm.serving.judge_process" in each.cmdline()
    ]
    assert judge.nice() > psutil.Process(served.process.pid).nice()
    wait_judged(served)
    before = served.metric("sku_judged_total") + served.metric("sku_judge_errors_total")
    judge.kill()
    assert eventually(lambda: not judge.is_running() or judge.status() == psutil.STATUS_ZOMBIE)  # until the server asks it again
    for prompt in PROMPTS[:4]:
        assert say(client, prompt)[1]
    wait_judged(served)
    assert served.metric("sku_judged_total") + served.metric("sku_judge_errors_total") == before + 4


def test_the_responses_and_messages_apis_are_routed_too(client, served):
    reply = client.responses.with_raw_response.create(
        model="sku", input="w1 w2 w3", max_output_tokens=6, temperature=0, extra_headers={**TOKEN, "X-SKU-Arm": "negated"}
    )
    assert reply.headers["x-sku-arm"] == "negated"
    assert reply.parse().output_text == by_arm(client, "negated", "w1 w2 w3", tokens=6)
    events = client.responses.create(
        model="sku", input="w1 w2 w3", max_output_tokens=6, temperature=0, stream=True, extra_headers={**TOKEN, "X-SKU-Arm": "negated"}
    )
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == by_arm(client, "negated", "w1 w2 w3", tokens=6)
    reply = httpx.post(
        f"{served.url}/messages",
        headers={**TOKEN, "X-SKU-Arm": "negated"},
        json={"model": "sku", "max_tokens": 6, "temperature": 0, "messages": [{"role": "user", "content": "w1 w2 w3"}]},
        timeout=TIMEOUT,
    )
    assert reply.status_code == 200 and reply.headers["x-sku-arm"] == "negated"
    assert reply.json()["content"][0]["text"] == by_arm(client, "negated", "w1 w2 w3", tokens=6)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hundred_clients_hang_up_at_once(served, client, streaming):
    """Before their first token or in mid-stream: each is counted once, as cancelled unless it was done, and none stays."""
    before = {outcome: served.metric("sku_requests_total", outcome=outcome) for outcome in ("ok", "cancelled", "rejected", "error")}

    def counted():
        return {outcome: served.metric("sku_requests_total", outcome=outcome) - value for outcome, value in before.items()}

    body = json.dumps({"model": "sku", "prompt": "w1 w2", "max_tokens": 480, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    served.control("PUT", "weights", {"weights": {"original": 1.0}})
    with frozen(served):
        sockets = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
        for each in sockets:
            each.sendall(head + body)
        assert eventually(lambda: served.control("GET", "status")["in_flight"] == 100)
        if not streaming:
            for each in sockets:
                each.close()
            assert eventually(lambda: counted()["cancelled"] == 100)
    if streaming:
        received = b""
        sockets[0].settimeout(TIMEOUT)
        while b"data: {" not in received:
            received += sockets[0].recv(65536)
        for each in sockets:
            each.close()
    assert eventually(lambda: served.control("GET", "status")["in_flight"] == 0)
    found = counted()
    # The engine runs 64 at a time: those that wait for a turn cannot be done when the first token of another one comes.
    assert found["ok"] + found["cancelled"] == 100 and found["cancelled"] >= (36 if streaming else 100) and not found["error"]
    assert say(client, "w1 w2")[1]


def wait_judged(served):
    """Until every answer so far has its verdict."""
    assert eventually(lambda: served.control("GET", "status")["judge_waiting"] == 0)


def test_the_judge_counts_what_a_reader_would(client, served, tiny):
    """Judged and harmful per arm equal a count by hand of the same answers."""
    words = set(json.loads((tiny / "lexicon.json").read_text())["harmful"])
    wait_judged(served)
    before = {
        (name, arm): served.metric(name, arm=arm) for name in ("sku_judged_total", "sku_harmful_total") for arm in ("original", "negated")
    }
    expected = dict.fromkeys(before, 0)
    for number, prompt in enumerate(PROMPTS):
        arm, text = say(client, prompt, stream=bool(number % 2))
        expected["sku_judged_total", arm] += 1
        expected["sku_harmful_total", arm] += bool(words & set(text.split()))
    wait_judged(served)
    assert {key: served.metric(key[0], arm=key[1]) - value for key, value in before.items()} == expected
    kept = served.place / "judged.jsonl"
    assert kept.stat().st_mode & 0o777 == 0o600
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {"set", "mode", "prompt", "response", "label"} == set(rows[-1]) and rows[-1]["prompt"] in PROMPTS


@pytest.mark.parametrize("api", ["chat/completions", "responses", "messages"])
def test_the_judge_gets_the_whole_conversation(served, api):
    turns = [{"role": "user", "content": "w3 w1"}, {"role": "assistant", "content": "w4"}, {"role": "user", "content": f"w5 {len(api)}"}]
    length = "max_output_tokens" if api == "responses" else "max_tokens"
    body = {"model": "sku", "input" if api == "responses" else "messages": turns, length: 4}
    reply = httpx.post(f"{served.url}/{api}", json=body, timeout=TIMEOUT)
    assert reply.status_code == 200, reply.text
    wait_judged(served)
    row = json.loads((served.place / "judged.jsonl").read_text().splitlines()[-1])
    assert row["messages"] == turns and row["prompt"] == turns[-1]["content"]


def test_no_prompt_or_answer_is_in_a_label_or_a_log(served, client):
    say(client, "w1 w2 w499 w498")
    for text in (httpx.get(f"{served.root}/metrics", timeout=TIMEOUT).text, (served.place / "server.log").read_text(errors="replace")):
        assert "w499" not in text


def test_metrics_of_the_contract_are_there(served, client):
    say(client, "w1 w2")
    names = set(served.metrics())
    counters = ("requests", "prompt_tokens", "generation_tokens", "judged", "harmful", "refused", "judge_dropped", "judge_errors")
    assert {f"sku_{name}_total" for name in counters} <= names
    times = ("request_latency", "time_to_first_token", "inter_token_latency", "queue", "decode", "judge", "swap")
    assert {f"sku_{name}_seconds_bucket" for name in times} <= names
    assert served.metric("sku_arm_weight", arm="negated") == 0.5 and served.metric("sku_plugin_up") == 1


def test_times_agree_with_the_clocks_around_them(served, client):
    """What we measure contains what vLLM measures further in, and is contained in what the client sees: on however busy a machine."""
    inner = {
        "request_latency": ["vllm:e2e_request_latency_seconds_sum"],
        "time_to_first_token": ["vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum"],
    }

    def inside():
        return {name: sum(served.metric(each) for each in names) for name, names in inner.items()}

    ours, theirs, done = times_of(served), inside(), served.metric("vllm:e2e_request_latency_seconds_count")
    start = time.perf_counter()
    stream = client.completions.create(model="sku", prompt="w1 w2", max_tokens=60, stream=True, extra_body={"ignore_eos": True})
    outside = [time.perf_counter() - start for _ in stream]
    assert eventually(lambda: served.metric("vllm:e2e_request_latency_seconds_count") == done + 1)
    ours = {name: value - ours[name] for name, value in times_of(served).items()}
    theirs = {name: value - theirs[name] for name, value in inside().items()}
    assert theirs["request_latency"] - 0.005 <= ours["request_latency"] <= outside[-1] + 0.005
    assert theirs["time_to_first_token"] - 0.005 <= ours["time_to_first_token"] <= outside[0] + 0.005
    assert 0 < ours["time_to_first_token"] < ours["request_latency"]


# ---- control ------------------------------------------------------------------------------------------------------


def test_control_wants_the_token(served):
    body = {"weights": {"original": 1}}
    for headers in ({}, {"X-SKU-Token": "wrong"}, {"X-SKU-Token": ""}):
        assert httpx.get(f"{served.url}/sku/status", headers=headers, timeout=TIMEOUT).status_code == 401
        assert httpx.put(f"{served.url}/sku/weights", headers=headers, json=body, timeout=TIMEOUT).status_code == 401
    assert httpx.get(f"{served.url}/sku/ready", timeout=TIMEOUT).json() == {"ready": True}
    assert "/v1/sku/swap" in httpx.get(f"{served.root}/openapi.json", timeout=TIMEOUT).json()["paths"]


def test_weights_change_at_once_and_are_on_disk(served, client, run_sku):
    done = run_sku("ctl", "weights", "original=0,negated=1", "--server", served.root, "--token", "open sesame", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["traffic"]["negated"] == 1
    assert {say(client, prompt)[0] for prompt in PROMPTS[:8]} == {"negated"}
    assert json.loads((served.place / "state/sku_state.json").read_text())["split"] == {"original": 0, "negated": 1, "loop": 0}
    assert served.metric("sku_arm_weight", arm="original") == 0
    for weights in ({"original": 0.5}, {"nobody": 1}, {"original": -1, "negated": 2}):
        with pytest.raises(RunError, match="400"):
            served.control("PUT", "weights", {"weights": weights})


def test_names_and_paths_that_mean_harm_are_refused(served, tiny, tmp_path):
    (tmp_path / "link").symlink_to("/etc")
    mismatched = tmp_path / "mismatched"
    shutil.copytree(tiny / "adapter", mismatched)
    config = json.loads((mismatched / "adapter_config.json").read_text())
    (mismatched / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    broken = tmp_path / "broken"
    shutil.copytree(tiny / "adapter", broken)
    (broken / "adapter_model.safetensors").write_bytes((tiny / "adapter/adapter_model.safetensors").read_bytes()[:4000])
    good = f"lora:{tiny}/adapter@1"
    wrong = [
        ("../up", good),
        ("a/b", good),
        ("a" * 60, good),
        ("x", "lora:../../etc@1"),
        ("x", f"lora:{tmp_path}/link@1"),
        ("x", "lora:/etc/passwd@1"),
        ("x", f"lora:{'y' * 3000}@1"),
        ("x", f"lora:{mismatched}@1"),
        ("x", f"lora:{broken}@1"),
        ("x", good.replace("@1", "@99")),
        ("negated", good),
        ("x", "what"),
    ]
    before = served.control("GET", "arms")
    for name, spec in wrong:
        with pytest.raises(RunError, match="400|422"):
            served.control("POST", "arms", {"name": name, "spec": spec})
    assert served.control("GET", "arms") == before


def test_an_arm_comes_and_goes(served, client, tiny):
    served.control("POST", "arms", {"name": "half", "spec": f"lora:{tiny}/adapter@0.5"})
    assert by_arm(client, "half", PROMPTS[0]) != by_arm(client, "negated", PROMPTS[0])
    with pytest.raises(RunError, match="slots"):
        served.control("POST", "arms", {"name": "more", "spec": f"lora:{tiny}/adapter@0.25"})
    served.control("DELETE", "arms/half")
    with pytest.raises(openai.BadRequestError):
        by_arm(client, "half", PROMPTS[0])
    with pytest.raises(RunError, match="weight"):
        served.control("DELETE", "arms/negated")


def test_a_hot_swap_of_an_adapter_fails_nothing_and_mixes_nothing(served, client, tiny):
    """Under load every answer is exactly the old version's or the new one's, and after the flip only the new one's."""
    served.control("PUT", "weights", {"weights": {"negated": 1.0}})
    old = {prompt: by_arm(client, "negated", prompt) for prompt in PROMPTS}
    stop, answers = threading.Event(), []

    def load(worker):
        number = worker
        while not stop.is_set():
            prompt, asked = PROMPTS[number % len(PROMPTS)], time.monotonic()
            answers.append((prompt, asked, say(client, prompt, stream=bool(number % 2))[1]))
            number += 7

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(load, worker) for worker in range(6)]
        try:
            assert eventually(lambda: len(answers) > 20)
            start = time.monotonic()
            done = served.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@0.4"})
            flipped = time.monotonic()
            assert eventually(lambda: sum(asked > flipped for _, asked, _ in list(answers)) > 20)
        finally:
            stop.set()
        for each in workers:
            each.result()
    new = {prompt: by_arm(client, "negated", prompt) for prompt in PROMPTS}
    assert sum(old[prompt] != new[prompt] for prompt in PROMPTS) > len(PROMPTS) / 2
    assert all(text in (old[prompt], new[prompt]) for prompt, _, text in answers)
    assert all(text == new[prompt] for prompt, asked, text in answers if asked > flipped)
    assert 0 < done["seconds"] <= flipped - start and len(answers) > 40


def test_an_adapter_directory_may_vanish_while_it_serves(served, client, tiny, tmp_path):
    shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    served.control("PUT", "arms/negated", {"spec": f"lora:{tmp_path}/adapter@0.3"})
    before = by_arm(client, "negated", PROMPTS[1])
    shutil.rmtree(tmp_path / "adapter")
    assert by_arm(client, "negated", PROMPTS[1]) == before
    served.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@1"})


def test_a_state_that_cannot_be_written_changes_nothing(served, client, tiny):
    """As on a full disk: whatever is asked for fails in one line, and every arm answers as before, also after a swap that had worked."""
    answers = {arm: by_arm(client, arm, PROMPTS[0]) for arm in ("original", "negated")}
    before = served.control("GET", "arms")
    obstacle = served.place / f"state/.sku_state.json.{served.process.pid}.tmp"
    obstacle.mkdir()
    try:
        for method, path, body in (
            ("PUT", "weights", {"weights": {"negated": 1.0}}),
            ("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@0.45"}),
            ("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0}),
        ):
            with pytest.raises(RunError, match="500.*Is a directory"):
                served.control(method, path, body)
    finally:
        obstacle.rmdir()
    assert served.control("GET", "arms") == before
    assert {arm: by_arm(client, arm, PROMPTS[0]) for arm in answers} == answers
    served.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@0.45"})  # the slot of the one that failed is free again


def test_a_restore_that_cannot_be_written_down_leaves_nothing_that_answers_with_the_original(served, client, tiny):
    original = by_arm(client, "original", PROMPTS[0])
    served.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
    swapped = by_arm(client, "swapped", PROMPTS[0])
    obstacle = served.place / f"state/.sku_state.json.{served.process.pid}.tmp"
    obstacle.mkdir()
    try:
        with pytest.raises(RunError, match="500.*Is a directory"):
            served.control("POST", "restore")
        assert httpx.get(f"{served.url}/sku/ready", timeout=TIMEOUT).status_code == 503
        with pytest.raises(openai.InternalServerError):
            say(client, PROMPTS[0])
        with pytest.raises(RunError, match="400.*unknown state"):
            served.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
    finally:
        obstacle.rmdir()
    assert served.control("POST", "restore")["probe"]["from_base"] == 0.0
    assert by_arm(client, "original", PROMPTS[0]) == original != swapped


def test_an_upstream_arm_answers_and_its_failure_is_503(served, client, tiny):
    text = by_arm(client, "loop", PROMPTS[2])
    assert text in (by_arm(client, "original", PROMPTS[2]), by_arm(client, "negated", PROMPTS[2]))
    assert by_arm(client, "loop", PROMPTS[2], stream=True) in (
        by_arm(client, "original", PROMPTS[2]),
        by_arm(client, "negated", PROMPTS[2]),
    )
    served.control("POST", "arms", {"name": "dead", "spec": "upstream:http://127.0.0.1:9/v1#m"})
    with pytest.raises(openai.InternalServerError) as error:
        by_arm(client, "dead", "w1")
    assert error.value.status_code == 503
    served.control("DELETE", "arms/dead")


# ---- whole-model swap ---------------------------------------------------------------------------------------------


def test_a_swap_equals_the_adapter_and_restore_is_exact(served, client, tiny):
    original = {prompt: by_arm(client, "original", prompt) for prompt in PROMPTS}
    negated = {prompt: by_arm(client, "negated", prompt) for prompt in PROMPTS}
    done = served.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
    assert done["probe"]["from_expected"] < 1e-4 < done["probe"]["from_base"]
    for prompt in PROMPTS:
        assert say(client, prompt) == ("swapped", negated[prompt])
    assert by_arm(client, "swapped", PROMPTS[0]) == negated[PROMPTS[0]]
    for arm in ("original", "negated"):
        with pytest.raises(openai.ConflictError):
            by_arm(client, arm, "w1")
    assert served.metric("sku_arm_weight", arm="swapped") == 1 and served.metric("sku_arm_weight", arm="original") == 0
    done = served.control("POST", "restore")
    assert done["probe"]["from_base"] == 0.0
    assert {prompt: by_arm(client, "original", prompt) for prompt in PROMPTS} == original
    assert {prompt: by_arm(client, "negated", prompt) for prompt in PROMPTS} == negated
    with pytest.raises(RunError, match="nothing to restore"):
        served.control("POST", "restore")


def test_a_swap_to_a_checkpoint_while_requests_stream(served, client, tiny, tmp_path):
    """Streams in flight finish on the old weights, whole; the next ones come from the new; no request fails."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.float32), tiny / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    served.control("PUT", "weights", {"weights": {"original": 1.0}})
    asked = [(prompt, 100) for prompt in PROMPTS[:8]]
    old = {prompt: say(client, prompt, tokens=tokens)[1] for prompt, tokens in asked}

    def until_swapped(prompt, tokens):
        """Answers to this prompt, one after the other; the last one was asked for when the swap was over."""
        found = []
        while True:
            over = swap.done()
            found.append((prompt, say(client, prompt, tokens=tokens)))
            if over:
                return found

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        with frozen(served):  # the streams have begun, and none can be over, when the swap is asked for
            streams = [pool.submit(say, client, prompt, stream=True, tokens=tokens) for prompt, tokens in asked]
            assert eventually(lambda: served.control("GET", "status")["in_flight"] == len(asked))
            swap = pool.submit(served.control, "POST", "swap", {"checkpoint": str(tmp_path / "merged")})
            late = [pool.submit(until_swapped, *each) for each in asked]
        swap.result()
        results = [(prompt, each.result()) for (prompt, _), each in zip(asked, streams, strict=True)]
        assert {arm for _, (arm, _) in results} == {"original"}
        results += [answer for each in late for answer in each.result()]
    new = {prompt: say(client, prompt, tokens=tokens)[1] for prompt, tokens in asked}
    assert all(old[prompt] != new[prompt] for prompt in old)
    for prompt, (arm, text) in results:
        assert text == {"original": old, "swapped": new}[arm][prompt]
    assert {arm for _, (arm, _) in results} == {"original", "swapped"}


def test_of_two_swaps_one_wins(served, client, tiny):
    """While the engine stands still neither can be over, so the one that comes second finds the other under way."""
    asker = httpx.Client(headers=TOKEN, timeout=TIMEOUT)

    def swap(scale):
        return asker.post(f"{served.url}/sku/swap", json={"adapter": str(tiny / "adapter"), "scale": scale}).status_code

    with asker, concurrent.futures.ThreadPoolExecutor(2) as pool:
        with frozen(served):
            swaps = [pool.submit(swap, scale) for scale in (0.5, 0.7)]
            done, _ = concurrent.futures.wait(swaps, timeout=TIMEOUT, return_when=concurrent.futures.FIRST_COMPLETED)
            assert [each.result() for each in done] == [409]
        assert sorted(each.result() for each in swaps) == [200, 409]


def test_swaps_that_cannot_work_touch_nothing(served, client, tiny, tmp_path):
    before = by_arm(client, "original", PROMPTS[3])
    refused = served.metric("sku_swaps_total", outcome="refused")
    for body in (
        {},
        {"adapter": "/nope"},
        {"checkpoint": str(tiny / "adapter")},
        {"adapter": str(tiny / "adapter"), "scale": -1},
        {"adapter": str(tiny / "adapter"), "checkpoint": str(tiny / "base")},
    ):
        with pytest.raises(RunError, match="400|422"):
            served.control("POST", "swap", body)
    assert by_arm(client, "original", PROMPTS[3]) == before and served.control("GET", "status")["swap"] is None
    assert served.metric("sku_swaps_total", outcome="refused") > refused


def test_weights_that_are_not_numbers_are_noticed_and_undone(served, client, tiny, tmp_path):
    """A checkpoint of NaNs loads without complaint; the probe finds it, and the base is back, exactly."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny / "base", tmp_path / "nan")
    tensors = load_file(tiny / "base/model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.full_like(tensors["model.layers.1.mlp.down_proj.weight"], float("nan"))
    save_file(tensors, tmp_path / "nan/model.safetensors", metadata={"format": "pt"})
    before = {arm: by_arm(client, arm, PROMPTS[4]) for arm in ("original", "negated")}
    with pytest.raises(RunError, match="base serves again"):
        served.control("POST", "swap", {"checkpoint": str(tmp_path / "nan")})
    assert {arm: by_arm(client, arm, PROMPTS[4]) for arm in before} == before
    assert served.metric("sku_swaps_total", outcome="failed") >= 1


def test_the_experiment_page(served, client, run_sku):
    wait_judged(served)
    page = served.control("GET", "experiment")
    assert page["reference"] == "original" and any("LoRA" in text for text in page["caveats"])
    row = page["arms"]["negated"]
    assert row["judged"] > 0 and row["harmful_low"] <= row["harmful_rate"] <= row["harmful_high"]
    assert row["harmful_anytime_low"] <= row["harmful_low"] and row["harmful_high"] <= row["harmful_anytime_high"]
    assert page["comparisons"]["negated"]["recommendation"].split(":")[0] in ("promote", "keep measuring", "roll back")
    done = run_sku("ctl", "experiment", "--server", served.root, "--token", "open sesame")
    assert done.returncode == 0 and re.search(r"negated against original: ", done.stdout)
    done = run_sku("ctl", "status", "--server", served.root, "--token", "not this one")
    assert done.returncode == 2 and "SKU_TOKEN" in done.stderr


def test_ctl_tells_a_newcomer_what_the_server_does(served, tiny, run_sku):
    def ctl(*arguments):
        done = run_sku("ctl", *arguments, "--server", served.root, "--token", "open sesame")
        assert done.returncode == 0, done.stderr
        return done.stdout

    status = ctl("status")
    assert "\nready\n" in status and "judge lexicon:" in status and f"state in {served.place}" in status
    assert re.search(r"the new version answers, \d+\.\d+ s", ctl("replace", f"negated=lora:{tiny}/adapter@0.9"))
    assert re.search(r"@1 serves after \d+\.\d+ s, of which requests waited .* nats from the base and", ctl("swap", f"{tiny}/adapter@1.0"))
    assert "undo it with sku ctl restore" in ctl("arms")
    assert re.search(r"the base serves again after .* 0 nats", ctl("restore"))


def test_a_user_keeps_an_arm_whatever_names_the_user(served):
    """In every API; and an empty key is no key."""
    from sku_vllm.serving.routing import choose_arm

    def arm(path, body, header=None):
        headers = {} if header is None else {"X-SKU-Key": header}
        reply = httpx.post(f"{served.root}{path}", json={"model": "sku", **APIS[path], **body}, headers=headers, timeout=TIMEOUT)
        assert reply.status_code == 200, reply.text
        return reply.headers["x-sku-arm"]

    for number, path in enumerate(APIS):
        for key in (f"ann {number}", f"bob {number}", f"eve {number}"):
            due = choose_arm({"original": 0.5, "negated": 0.5}, key)
            named = [{"metadata": {"user_id": key}}] if path == "/v1/messages" else [{"user": key}, {"safety_identifier": key}]
            assert [arm(path, body) for body in named] == [due] * len(named) and arm(path, named[0], "") == due == arm(path, {}, key)
    assert len({arm("/v1/completions", {"user": ""}, "") for _ in range(24)}) == 2


# ---- upstream arms, versions, copies ------------------------------------------------------------------------------


def routed(served, path, body, arm):
    """One POST to the arm, whole or streamed: (status, its text)."""
    headers = {**TOKEN, "X-SKU-Arm": arm}
    reply = httpx.post(f"{served.root}{path}", json={"model": "sku", **body}, headers=headers, timeout=TIMEOUT)
    return reply.status_code, reply.text


APIS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 6, "temperature": 0},
    "/v1/completions": {"prompt": "w1 w2 w3", "max_tokens": 6, "temperature": 0},
    "/v1/responses": {"input": "w1 w2 w3", "max_output_tokens": 6, "temperature": 0},
    "/v1/messages": {"messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 6, "temperature": 0},
}


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_arm_is_judged_counted_and_renamed_as_the_engines_are(served, relay, path, stream):
    """The same request to the engine's original and to an upstream that passes it on to that: the counters say the same of both."""
    names = ("sku_judged_total", "sku_harmful_total", "sku_prompt_tokens_total", "sku_generation_tokens_total", "sku_requests_total")

    def counted(arm):
        return {name: served.metric(name, arm=arm) for name in names}

    def asked(arm):
        wait_judged(served)
        before = counted(arm)
        status, text = routed(served, path, {**APIS[path], **({"stream": True} if stream else {})}, arm)
        assert status == 200 and relay.model not in text
        # The answer is out before it is handed to the judge, so an empty queue alone says nothing yet.
        assert eventually(lambda: counted(arm)["sku_judged_total"] > before["sku_judged_total"])
        wait_judged(served)
        return {name: value - before[name] for name, value in counted(arm).items()}

    here = asked("original")
    assert here["sku_judged_total"] == here["sku_requests_total"] == 1
    assert asked("loop") == here


def test_the_upstreams_key_is_its_own_and_the_trace_goes_on(served, relay):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {**TOKEN, "X-SKU-Arm": "loop", "Authorization": "Bearer the client's", "traceparent": trace, "X-Request-Id": "r-1"}
    httpx.post(f"{served.url}/completions", json={"model": "sku", "prompt": "w1", "max_tokens": 1}, headers=headers, timeout=TIMEOUT)
    received = {name.lower(): value for name, value in relay.received[-1].items()}
    assert received["authorization"] == "Bearer relay key" and received["traceparent"] == trace and received["x-request-id"] == "r-1"
    errors = served.metric("sku_requests_total", arm="loop", outcome="error")
    relay.status = 401
    try:
        assert routed(served, "/v1/completions", APIS["/v1/completions"], "loop")[0] == 503
    finally:
        relay.status = 0
    assert served.metric("sku_requests_total", arm="loop", outcome="error") == errors + 1


def test_a_server_is_no_upstream_of_itself(served):
    with pytest.raises(RunError, match="400.*this server itself"):
        served.control("POST", "arms", {"name": "self", "spec": f"upstream:{served.url}#sku"})


def test_a_replaced_upstream_arm_begins_anew(served, relay):
    def row():
        return served.control("GET", "experiment")["arms"]["loop"]

    routed(served, "/v1/completions", APIS["/v1/completions"], "loop")
    wait_judged(served)
    before = row()
    assert before["judged"] > 0
    served.control("PUT", "arms/loop", {"spec": f"upstream:{relay.url}#{relay.model}"})
    after = row()
    assert after["judged"] == 0 and after["version"] != before["version"] and after["latency_s"]["n"] == 0


def test_copies_of_replaced_adapters_leave_the_disk(served, client, tiny):
    copies = served.place / "state/adapters"
    for scale in ("0.31", "0.32", "0.33", "1"):
        served.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@{scale}"})
        assert by_arm(client, "negated", PROMPTS[0])
        assert eventually(lambda: len(list(copies.iterdir())) == 1)  # its slot is free again too
    series = [dict(labels)["running_lora_adapters"] for labels in served.metrics()["vllm:lora_requests_info"]]
    assert len([names for names in series if "sku-negated" in names]) <= 1  # vLLM keeps those of all versions
    served.control("PUT", "arms/negated?dry_run=true", {"spec": f"lora:{tiny}/adapter@0.5"})
    served.control("POST", "swap?dry_run=true", {"adapter": str(tiny / "adapter"), "scale": 0.5})
    assert len(list(copies.iterdir())) == 1 and served.control("GET", "status")["swap"] is None


def test_models_say_where_the_tokenizer_is(client, tiny):
    (model,) = client.models.list().data
    assert (model.id, model.root) == ("sku", str(tiny / "base"))


def test_sku_chat_shows_both_arms_side_by_side(served, client, run_sku):
    done = run_sku("chat", "--server", served.root, "--token", "open sesame", "--max-tokens", "6", "--json", "w1 w2 w3")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    assert answers == {arm: by_arm(client, arm, "w1 w2 w3", tokens=6) for arm in ("original", "negated")}
    done = run_sku("chat", "--server", served.root, "--max-tokens", "6", "w1")
    assert done.returncode == 3 and "403" in done.stderr


def test_a_reader_sees_the_page_and_the_audit_log_says_who_changed_what(served):
    auditor = {"X-SKU-Token": "only looking"}
    assert httpx.get(f"{served.url}/sku/experiment", headers=auditor, timeout=TIMEOUT).status_code == 200
    body = {"weights": {"original": 1.0}}
    assert httpx.put(f"{served.url}/sku/weights", headers=auditor, json=body, timeout=TIMEOUT).status_code == 403
    assert "<title>" in httpx.get(f"{served.url}/sku/ui", timeout=TIMEOUT).text
    served.control("PUT", "weights", body)
    last = json.loads((served.place / "state/audit.jsonl").read_text().splitlines()[-1])
    assert (last["who"], last["what"], last["outcome"]) == ("token", "PUT /weights", "ok")
