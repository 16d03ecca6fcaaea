"""What vLLM would start and we cannot make safe is refused before an engine runs, with the reason."""

from argparse import Namespace

import pytest

from sku_vllm.errors import ConfigError
from sku_vllm.serving.serve_config import ServeConfig
from sku_vllm.serving.vllm_flags import check_processes

ADAPTER = ["original=base", "negated=lora:/adapter@1"]


def refused(adapters=True, state=None, run="/run", **flags):
    """The reason, or None. Flags as vLLM's parser names them, everything else at its default."""
    args = Namespace(**{"api_server_count": None, "data_parallel_size": 1, "nnodes": 1, "distributed_executor_backend": None} | flags)
    config = ServeConfig("model", ADAPTER if adapters else ["original=base"], state=state, run=run)
    try:
        return check_processes(args, config, adapters)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"api_server_count": 2},
        {"data_parallel_size": 2},
        {"data_parallel_size": 2, "api_server_count": 1},
        {"distributed_executor_backend": "mp"},
        {"data_parallel_rank": None, "headless": False},
    ],
)
def test_what_works_is_not_refused(flags):
    assert refused(**flags) is None


@pytest.mark.parametrize(
    "flags", [{"data_parallel_external_lb": True}, {"data_parallel_hybrid_lb": True}, {"data_parallel_rank": 1}, {"headless": True}]
)
def test_ranks_that_are_servers_of_their_own_are_refused(flags):
    assert f"--{next(iter(flags)).replace('_', '-')}" in refused(**flags) and "server of its own" in refused(**flags)


@pytest.mark.parametrize("flags", [{"distributed_executor_backend": "ray"}, {"data_parallel_backend": "ray"}, {"nnodes": 2}])
def test_adapters_on_several_machines_need_a_shared_directory(flags):
    assert "--state DIR" in refused(**flags)
    assert refused(**flags, state="/shared") is None and refused(**flags, adapters=False) is None


def test_several_api_servers_need_something_to_share(monkeypatch):
    assert "--state DIR" in refused(api_server_count=2, run=None)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    assert "collide" in refused(api_server_count=2) and refused() is None


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--distributed-executor-backend", "--data-parallel-backend"])
def test_ray_is_refused_where_vllm_cannot_run_on_it(tiny, run_sku, flag):
    from vllm.platforms import current_platform

    if current_platform.ray_device_key:
        pytest.skip("vLLM runs on Ray here")
    done = run_sku("serve", "--model", tiny / "base", "--arm", "original=base", flag, "ray")
    assert done.returncode == 2, done.stderr
    assert f"{flag} ray: vLLM does not run on Ray on this platform" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_adapters_on_a_mixture_of_experts_are_refused_on_a_cpu(tiny, tmp_path, run_sku):
    """A real one, with an adapter that fits it: exit 2, one line, before an engine starts."""
    import shutil

    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM's CUDA build has the kernel")
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    )
    shutil.copytree(tiny / "base", tmp_path / "moe", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model.save_pretrained(tmp_path / "moe")
    get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    done = run_sku("serve", "--model", tmp_path / "moe", "--arm", "original=base", "--arm", f"negated=lora:{tmp_path}/adapter@1")
    assert done.returncode == 2, done.stderr
    assert "mixture of experts" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr.splitlines()[-1]
