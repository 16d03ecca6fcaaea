"""The servers `sku bench serve` measures: one model, three ways to serve it, each started when first asked for."""

import contextlib
import json
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sku_vllm.cli.options import log

FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32", "--no-enable-prefix-caching")


class Servers:
    """The servers; each ends when `stack` is closed. `seconds` of a server: from the command to its first answer."""

    def __init__(self, stack: contextlib.ExitStack, base: Path, adapter: Path, work: Path, load: Any) -> None:
        self.stack, self.base, self.adapter, self.work, self.load = stack, base, adapter, work, load

    @cached_property
    def quick(self) -> Any:
        """Original and LoRA arm, and a judge that takes 0.2 ms an answer; it judges nothing until it is told to."""
        return self._up("the server with a fast judge", self.base, self._arms, judge=self._lexicon, judge_sample=0.0)

    @cached_property
    def twins(self) -> Any:
        """Two arms of the base, half the traffic each; the fast judge judges everything."""
        split = "original=0.5,twin=0.5"
        return self._up("the server of two equal arms", self.base, ["original=base", "twin=base"], split, judge=self._lexicon)

    @cached_property
    def stuck(self) -> Any:
        """Original and LoRA arm, and a judge that never answers."""
        from sku_vllm.benchmarks.serve_cost import stalled_judge

        stalled = self.stack.enter_context(stalled_judge())
        return self._up(
            "the server with a stalled judge", self.base, self._arms, judge=f"openai:{stalled}#m", judge_sample=0.0, judge_queue=8
        )

    @cached_property
    def fused(self) -> Any:
        """A plain engine of the fused weights."""
        from sku_vllm.fuse.fuse import fuse_checkpoint
        from sku_vllm.fuse.fuse_request import FuseRequest

        fuse_checkpoint(FuseRequest(self.base, [(self.adapter, 1.0)], self.work / "fused"))
        return self._up("the server of fused weights", self.work / "fused", ["fused=base"])

    @property
    def _arms(self) -> list[str]:
        return ["original=base", f"negated=lora:{self.adapter}@1"]

    @cached_property
    def _lexicon(self) -> str:
        lexicon = self.work / "lexicon.json"
        lexicon.write_text(json.dumps({"harmful": [f"w{number}" for number in range(0, 2000, 9)]}))
        return f"lexicon:{lexicon}"

    @cached_property
    def scratch(self) -> Path:
        """The servers' temporary directory, where nothing else writes."""
        (place := self.work / "tmp").mkdir()
        return place

    def _up(self, name: str, model: Path, arms: Sequence[str], split: str = "", **settings: Any) -> Any:
        from sku_vllm.serving.serve_config import ServeConfig
        from sku_vllm.serving.start import serve

        log(f"starting {name}")
        start = time.perf_counter()
        split = split or f"{arms[0].split('=')[0]}=1"
        config = ServeConfig(str(model), list(arms), split, expose_arms=True, token="benchmark-token", **settings)
        server: Any = self.stack.enter_context(serve(config, FLAGS, env={"TMPDIR": str(self.scratch)}))
        server.seconds = time.perf_counter() - start
        self.load(server, "sku")  # warm
        return server
