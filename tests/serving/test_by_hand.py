"""vLLM started by hand, without `sku serve`, on two tensor-parallel ranks whose weights are edited in place."""

import concurrent.futures
import shutil
import sys
from pathlib import Path

import httpx
import pytest

from sku_vllm.serving.start import free_port

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import FLAGS, PROMPTS, TOKEN, complete, serve, text  # noqa: E402

pytestmark = pytest.mark.slow
PLAIN_WORKER = '''
import hashlib
import vllm._custom_ops
from sku_vllm.serving.worker_extension import SkuWorkerExtension

# torch's own linear layer reads `weight` at every call, as CUDA's does; without this vLLM repacks it on a CPU and drops it.
vllm._custom_ops._supports_onednn = False

class Plain(SkuWorkerExtension):
    def digest(self):
        """Every bit of this rank's parameters."""
        found = hashlib.sha256()
        for name, parameter in sorted(self.get_model().named_parameters()):
            found.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
        return found.hexdigest()
'''


def digests(server):
    """One per rank, through vLLM's development route."""
    return httpx.post(f"{server.root}/collective_rpc", json={"method": "digest"}, timeout=300).json()["results"]


def test_vllm_started_by_hand_with_two_ranks(tiny, tmp_path):
    """VLLM_PLUGINS=sku and SKU_SERVE_CONFIG, no `sku serve`, tensor parallelism 2: arms, NAME@SCALE, swap and exact restore."""
    (tmp_path / "root").mkdir()
    shutil.copytree(tiny / "adapter", tmp_path / "root/adapter")
    (tmp_path / "root/link").symlink_to(tiny / "adapter")
    port, log = free_port("127.0.0.1"), tmp_path / "server.log"
    (tmp_path / "serve.yaml").write_text(
        f"model: {tiny}/base\narms: {{original: base, negated: 'lora:{tiny}/adapter@1'}}\nsplit: {{original: 0.5, negated: 0.5}}\n"
        f"judge: lexicon:{tiny}/lexicon.json\nexpose_arms: true\ntoken: {TOKEN}\nstate: {tmp_path}/state\nadapter_root: {tmp_path}/root\n"
    )
    (tmp_path / "plain_worker.py").write_text(PLAIN_WORKER)
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(tiny / "base"),
        "--port",
        str(port),
        "--enable-lora",
        "--max-loras",
        "4",
        "--max-lora-rank",
        "8",
        "--tensor-parallel-size",
        "2",
        "--worker-extension-cls",
        "plain_worker.Plain",
        *FLAGS,
    ]
    env = {
        "VLLM_PLUGINS": "sku",
        "SKU_SERVE_CONFIG": str(tmp_path / "serve.yaml"),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": str(tmp_path),
    }
    with serve(*command, port=port, log=log, env=env, ready=400) as server:
        base = {prompt: text(complete(server, "original", prompt)) for prompt in PROMPTS}
        negated = {prompt: text(complete(server, "negated", prompt)) for prompt in PROMPTS}
        assert sum(base[prompt] != negated[prompt] for prompt in PROMPTS) > 8
        resolver(server, base, negated)
        pristine = digests(server)
        assert len(pristine) == 2
        done = server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
        assert done["in_place"] and done["probe"]["from_base"] > 1e-4
        edited = digests(server)
        assert all(one != other for one, other in zip(pristine, edited, strict=True))
        assert {prompt: text(complete(server, "sku", prompt)) for prompt in PROMPTS} == negated
        assert complete(server, "original").status_code == complete(server, "adapter@1").status_code == 409
        server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 0.5})
        assert digests(server) not in (pristine, edited)
        server.control("POST", "swap", {"adapter": str(tiny / "adapter"), "scale": 1.0})
        assert digests(server) == edited, "an edit after another one is from the base"
        assert server.control("POST", "restore")["probe"]["from_base"] == 0.0
        assert digests(server) == pristine
        reloaded(server, tiny, tmp_path, pristine, edited)
        assert {prompt: text(complete(server, "original", prompt)) for prompt in PROMPTS} == base
        assert server.metric("sku_requests_total", arm="swapped") == len(PROMPTS)


def reloaded(server, tiny, tmp_path, pristine, edited):
    """A fused checkpoint goes through vLLM's reload, to the very bits of the edit in place, and back."""
    from sku_vllm.fuse.fuse import fuse_checkpoint
    from sku_vllm.fuse.fuse_request import FuseRequest

    fuse_checkpoint(FuseRequest(tiny / "base", [(tiny / "adapter", 1.0)], tmp_path / "fused"))
    done = server.control("POST", "swap", {"checkpoint": str(tmp_path / "fused")})
    assert not done["in_place"] and digests(server) == edited
    assert server.control("POST", "restore")["probe"]["from_base"] == 0.0
    assert digests(server) == pristine


def resolver(server, base, negated):
    """NAME@SCALE below the root resolves, more of them than there are slots, and the base's rows stay the base's; nothing else does."""
    assert {prompt: text(complete(server, "adapter@1", prompt)) for prompt in PROMPTS[:6]} == {
        prompt: negated[prompt] for prompt in PROMPTS[:6]
    }
    asked = [(model, prompt) for prompt in PROMPTS[:6] for model in ("original", "adapter@0.1", "adapter@1.00", "negated")]
    for scale in ("0.2", "0.3", "0.4"):
        assert text(complete(server, f"adapter@{scale}", PROMPTS[0]))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda each: text(complete(server, *each)), [(arm, prompt) for arm, prompt in asked if arm in ("original", "negated")]
                )
            )
        assert answers == [{"original": base, "negated": negated}[arm][prompt] for arm, prompt in asked if arm in ("original", "negated")]
    for model in (
        "link@1",
        "../adapter@1",
        "/etc@1",
        "nobody@1",
        "adapter@99",
        "adapter@-1",
        "adapter@nan",
        "a" * 200 + "@1",
        "adapter",
        "root/adapter@1",
    ):
        assert complete(server, model).status_code == 404, model
    for path in ("load_lora_adapter", "unload_lora_adapter"):
        reply = httpx.post(f"{server.url}/{path}", json={"lora_name": "x", "lora_path": "/etc"}, timeout=300)
        assert reply.status_code == 403
