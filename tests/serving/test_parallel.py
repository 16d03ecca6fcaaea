"""Two engines behind one API server (data parallel): both serve every arm, an adapter changes in both, a whole-model swap is refused, and
the death of a worker ends the server as a failure.
"""

import concurrent.futures
import sys
from pathlib import Path

import pytest

from sku_vllm.errors import RunError
from sku_vllm.serving.start import free_port

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import FLAGS, PROMPTS, all_gone, complete, eventually, family, serve, sku_serve, text  # noqa: E402

pytestmark = pytest.mark.slow


def answers(server, arm):
    """Every prompt asked four times at once, so that both engines get it; what they say must not differ."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda prompt: (prompt, text(complete(server, arm, prompt))), PROMPTS * 4))
    said = {prompt: {each for asked, each in found if asked == prompt} for prompt in PROMPTS}
    assert all(len(each) == 1 for each in said.values())
    return {prompt: each.pop() for prompt, each in said.items()}


def test_two_engines_behind_one_api_server(tiny, tmp_path):
    port = free_port("127.0.0.1")
    command = sku_serve(
        tiny,
        "--port",
        port,
        "--expose-arms",
        "--judge",
        f"lexicon:{tiny}/lexicon.json",
        "--data-parallel-size",
        2,
        "--api-server-count",
        1,
        *FLAGS,
    )
    with serve(*command, port=port, log=tmp_path / "server.log", env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, ready=400) as server:
        base, negated = answers(server, "original"), answers(server, "negated")
        assert sum(base[prompt] != negated[prompt] for prompt in PROMPTS) > 8
        assert all(server.metric("vllm:request_success_total", engine=engine) > 0 for engine in ("0", "1"))
        assert server.metric("sku_requests_total", outcome="ok") == 8 * len(PROMPTS)
        assert eventually(lambda: server.metric("sku_judged_total") == 8 * len(PROMPTS))
        server.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@0.4"})
        weaker = answers(server, "negated")
        assert sum(weaker[prompt] != negated[prompt] for prompt in PROMPTS) > 8 and answers(server, "original") == base
        server.control("PUT", "arms/negated", {"spec": f"lora:{tiny}/adapter@1"})
        assert answers(server, "negated") == negated
        with pytest.raises(RunError, match="400.*one engine"):
            server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
        a_worker_is_killed(server)


def a_worker_is_killed(server):
    """Nothing is left half alive, and a supervisor sees a failure: vLLM itself ends with 0."""
    processes = family(server.process)
    next(each for each in processes if each.cmdline()[0].startswith("VLLM::Worker")).kill()
    assert server.process.wait(300) == 3
    assert all_gone(processes)
