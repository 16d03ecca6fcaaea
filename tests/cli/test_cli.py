"""The command line as a whole: start-up time, laziness, help, configuration files, errors, exit codes."""

import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sku_vllm.cli import COMMANDS, sku
from sku_vllm.cli.options import adapter_at_scale, named_files, sku_command
from sku_vllm.errors import ConfigError


def test_help_is_fast_and_loads_neither_torch_nor_vllm():
    code = (
        "import sys; sys.argv = ['sku', '--help']\nfrom sku_vllm.cli import main\ntry: main()\n"
        "finally: print('LOADED', {'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    times = []
    for _ in range(3):
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
        assert result.returncode == 0 and "LOADED set()" in result.stdout
    # Of the processor, not of the clock, which counts what other programs of a busy machine take as well.
    assert min(times) < 0.5, f"sku --help took {min(times):.2f} s"


def test_importing_the_package_is_light():
    code = "import sys, sku_vllm; sys.exit(bool({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_without_torch(name):
    code = (
        f"import sys\nfrom sku_vllm.cli import main\ntry: main([{name!r}, '--help'])\n"
        "finally: print('LOADED', {'torch', 'vllm'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"sku {name}" in result.stdout and "LOADED set()" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_page_has_an_example_that_parses_and_the_exit_codes(name):
    command = sku.get_command(None, name)
    if name == "bench":
        return
    page = command.get_help(click.Context(command, info_name=f"sku {name}"))
    assert " ".join(page.split()).count("Exit codes: 0 done;") == 1
    examples = re.findall(rf"^  sku {name} .*(?:\\\n.*)*", page.replace("\\\n", ""), re.M)
    assert examples, page
    for example in examples:
        command.make_context(name, shlex.split(example)[2:])


def test_an_empty_word_is_an_unset_variable_and_not_a_flag_left_out(run_sku, tmp_path):
    result = run_sku("train", "--model", "x", "--forget", "x", "--retain", "", "--output", tmp_path / "out")
    assert result.returncode == 2 and result.stderr.startswith("error: --retain: is empty")
    assert len(result.stderr.strip().splitlines()) == 1


def test_unknown_command_and_flag_exit_2_in_one_line(run_sku):
    for arguments in (["trian"], ["fuse", "--modle", "x"], ["negate"], []):
        result = run_sku(*arguments)
        assert result.returncode == 2, arguments
        assert "Traceback" not in result.stderr
        if arguments:
            assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.fixture
def command() -> click.Command:
    @sku_command("probe")
    @click.option("--learning-rate", "--lr", "learning_rate", type=float, default=1.0)
    @click.option("--forget", multiple=True)
    @click.option("--verbose", is_flag=True)
    def probe(learning_rate: float, forget: tuple[str, ...], verbose: bool, json_output: bool) -> None:
        click.echo(f"{learning_rate} {forget} {verbose}")

    return probe


def run(command: click.Command, *arguments: str) -> str:
    from click.testing import CliRunner

    result = CliRunner().invoke(command, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output.strip()


def test_flags_win_over_the_config_file(command, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("lr: 2e-4\nforget: a=b\nverbose: true\n")
    assert run(command, "--config", str(config)) == "0.0002 ('a=b',) True"
    assert run(command, "--config", str(config), "--lr", "3") == "3.0 ('a=b',) True"
    assert run(command, "--lr", "3", "--config", str(config)) == "3.0 ('a=b',) True"


def test_config_errors_name_file_key_and_nearest(command, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("learning-rat: 1\n")
    with pytest.raises(ConfigError, match="learning-rat.*did you mean 'learning-rate'"):
        run(command, "--config", str(config))
    config.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="c.yaml.*option: value"):
        run(command, "--config", str(config))
    config.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        run(command, "--config", str(config))
    with pytest.raises(ConfigError, match="No such file"):
        run(command, "--config", str(tmp_path / "absent.yaml"))


def test_named_files_and_scales():
    assert named_files(("seen=a.jsonl", "x=y=z"), "--forget") == {"seen": "a.jsonl", "x": "y=z"}
    for bad in ("seen", "=a", "a="):
        with pytest.raises(ConfigError, match="--forget"):
            named_files((bad,), "--forget")
    with pytest.raises(ConfigError, match="twice"):
        named_files(("a=b", "a=c"), "--forget")
    assert adapter_at_scale("runs/a@b@0.8") == ("runs/a@b", 0.8)
    assert adapter_at_scale("runs/a@b", 1.0) == ("runs/a@b", 1.0)
    assert adapter_at_scale("runs/a") == ("runs/a", None)


def test_a_directory_of_exactly_that_name_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("harm@2").mkdir()
    assert adapter_at_scale("harm@2", 1.0) == ("harm@2", 1.0)
    assert adapter_at_scale("harm@2@0.5", 1.0) == ("harm@2", 0.5)
    Path("harm").mkdir()
    with pytest.raises(ConfigError, match="harm@2@1 .* harm/@2"):
        adapter_at_scale("harm@2", 1.0)
    assert adapter_at_scale("harm@2@1") == ("harm@2", 1.0) and adapter_at_scale("harm/@2") == ("harm/", 2.0)


FINALISED = """
import os, signal, time
from sku_vllm.cli import interrupts
interrupts.raise_interrupts()

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.NUMBER)
        time.sleep(0.1)  # the signal arrives here, where Python drops what is raised

try:
    Slow()
    begun = time.monotonic()
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted" if time.monotonic() - begun < 30 else "late")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_arrives_while_an_object_is_finalised_is_not_lost(name):
    done = subprocess.run([sys.executable, "-c", FINALISED.replace("NUMBER", name)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
