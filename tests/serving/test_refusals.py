"""What vLLM would start and we cannot make safe is refused before an engine runs, with the reason."""

from argparse import Namespace

import pytest

from sku_vllm.errors import AdapterError, ConfigError
from sku_vllm.serving.serve_config import ServeConfig
from sku_vllm.serving.start import free_port
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


@pytest.fixture
def by_hand(tiny, tmp_path, monkeypatch):
    """`check` of a vLLM started by hand with these flags and settings: what it says, or None."""
    from types import SimpleNamespace

    from sku_vllm.serving.by_hand import check

    def said(settings="", **flags):
        (tmp_path / "serve.yaml").write_text(f"arms: {{original: base, negated: 'lora:{tiny}/adapter@1'}}\n{settings}")
        monkeypatch.setenv("SKU_SERVE_CONFIG", str(tmp_path / "serve.yaml"))
        args = {"model": "m", "served_model_name": None, "enable_lora": True, "max_loras": 4, "max_lora_rank": 8} | flags
        try:
            return check(SimpleNamespace(**args), SimpleNamespace(get_num_experts=lambda: 0))
        except ConfigError as error:
            return str(error)

    return said


def test_arms_that_a_vllm_started_by_hand_could_not_serve_are_found_before_its_engine_starts(by_hand, tiny):
    assert by_hand() is None
    assert f"{tiny}/adapter has rank 8" in by_hand(max_lora_rank=1) and "--max-lora-rank 8" in by_hand(max_lora_rank=1)
    assert "--enable-lora" in by_hand(enable_lora=False) and "--max-loras 1" in by_hand(max_loras=1)
    assert "--served-model-name 'negated'" in by_hand(served_model_name=["negated"])
    assert "unknown key 'splits'" in by_hand("splits: {}")


def test_the_arms_of_a_saved_state_count_not_those_of_the_file(tiny, tmp_path):
    """`sku ctl` may have changed them, and the raw adapter may be gone since; with reset_state the file's count again."""
    import shutil

    from sku_vllm.serving.arms import parse_arm
    from sku_vllm.serving.initial_state import ranks_of_arms
    from sku_vllm.serving.state import Served, StateFile, Table

    gone, copy = parse_arm("negated", "lora:/gone@1"), tmp_path / "state/adapters/copy"
    elsewhere = tmp_path / "before it was moved/copy"
    elsewhere.mkdir(parents=True)
    StateFile(tmp_path / "state").write(Table({"negated": Served(gone, str(elsewhere), 1_000_001)}, {"negated": 1.0}))
    shutil.rmtree(elsewhere.parent)
    config = ServeConfig("m", ["a=base"], state=str(tmp_path / "state"))
    with pytest.raises(AdapterError, match="/gone"):  # the copy is gone too, and would have to be written again
        ranks_of_arms(config)
    shutil.copytree(tiny / "adapter", copy)
    (copy / "sku_run.json").write_text("{}")
    assert ranks_of_arms(config) == {gone: 8}
    config.reset_state = True
    assert ranks_of_arms(config) == {}


def test_only_a_server_that_nobody_has_checked_is_checked(monkeypatch):
    from sku_vllm.serving import by_hand

    monkeypatch.setattr(by_hand, "FLAGS", "sys")
    for variable, plugins, wanted in (
        ("/etc/serve.yaml", None, True),
        (None, "sku", True),
        (None, "other", False),
        (None, None, False),
        ("/tmp/sku-serve-x/serve.yaml", "sku", False),
    ):
        for name, value in (("SKU_SERVE_CONFIG", variable), ("VLLM_PLUGINS", plugins)):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        assert by_hand.wanted() is wanted, (variable, plugins)
    monkeypatch.setattr(by_hand, "FLAGS", "not.imported")
    monkeypatch.setenv("VLLM_PLUGINS", "sku")
    assert not by_hand.wanted(), "a worker never turns flags into a configuration"


@pytest.mark.slow
def test_vllm_started_by_hand_ends_with_one_line_before_its_engine(tiny, tmp_path):
    import os
    import subprocess
    import sys

    (tmp_path / "serve.yaml").write_text(f"arms: {{original: base, negated: 'lora:{tiny}/adapter@1'}}\n")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny / "base"), "--enforce-eager"]
    command += [
        "--max-model-len",
        "512",
        "--enable-lora",
        "--max-loras",
        "4",
        "--max-lora-rank",
        "1",
        "--port",
        str(free_port("127.0.0.1")),
    ]
    environment = {**os.environ, "VLLM_PLUGINS": "sku", "SKU_SERVE_CONFIG": str(tmp_path / "serve.yaml"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert said == [f"error: --max-lora-rank 1: arm negated: {tiny}/adapter has rank 8; start the server with --max-lora-rank 8"]
    assert "EngineCore" not in done.stderr + done.stdout
