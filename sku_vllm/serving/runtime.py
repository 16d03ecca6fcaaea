"""What one API-server process knows: the table, the engine, the judge. Made by the plugin, used by middleware, engine and control."""

import asyncio
import atexit
import hmac
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sku_vllm.judges import Verdict
from sku_vllm.serving.arms import ALIAS, SWAPPED, Arm
from sku_vllm.serving.begin import prepare_state
from sku_vllm.serving.config import ServeConfig
from sku_vllm.serving.engine import wrap_generate
from sku_vllm.serving.experiment import Experiment
from sku_vllm.serving.guard import Guard, parse_rule
from sku_vllm.serving.judge_process import JudgeProcess
from sku_vllm.serving.launch import check_flags, on_cpu
from sku_vllm.serving.metrics import metrics
from sku_vllm.serving.observe import JudgeQueue
from sku_vllm.serving.routing import choose_arm
from sku_vllm.serving.scratch import private_directory
from sku_vllm.serving.sharing import Sharing
from sku_vllm.serving.state import Served, StateFile, Table

logger = logging.getLogger("vllm.sku")


class Unavailable(Exception):
    """The chosen arm cannot answer. status: 409 while its base is swapped away, 503 when it has failed. arm: to count it for."""

    def __init__(self, status: int, message: str, arm: str | None = None) -> None:
        super().__init__(message)
        self.status, self.arm = status, arm


class Runtime:
    """One process's view. `table` is the shared truth; what failed and what is in flight is this process's own."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.metrics = metrics()
        self.directory = Path(config.state or config.run or directory_of_this_process())
        self.state = StateFile(self.directory)
        self.experiment = Experiment()
        rule = parse_rule(config.rollback_if) if config.rollback_if else None
        self.guard = Guard(self.state, self.change, rule, config.drift, self.experiment.total) if rule or config.drift else None
        self.judge = JudgeQueue(
            JudgeProcess(config.judge) if config.judge else None, self.metrics, sample=config.judge_sample,
            size=config.judge_queue, keep=config.keep_judged, found=self._judged,
        )
        self.failures: dict[str, str] = {}
        self.broken: str | None = None  # why the engine's own weights cannot be trusted
        self.in_flight: Counter[int] = Counter()  # HTTP requests by lora_id; 0 is the engine without adapter
        self.gate = asyncio.Event()  # closed while a whole-model swap drains and works: requests wait, none fails
        self.gate.set()
        self.engine: Any = None
        self.models: Any = None
        self.args: Any = None
        self.ready = False
        self._shown = 0
        self._session: Any = None

    def _judged(self, arm: str, version: int, verdict: Verdict) -> None:
        served = self.table.arms.get(arm)
        if served and served.lora_id != version:
            return  # an answer of a version that was replaced while it waited
        self.experiment.judged(arm, verdict)
        if self.guard:
            self.guard.look(arm)

    def session(self) -> Any:
        """The HTTP client of upstream arms, one per process; no overall timeout, since answers stream for minutes."""
        if self._session is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10), connector=aiohttp.TCPConnector(limit=0)
            )
        return self._session

    # ---- the table ----------------------------------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """The table as it stands now, in every process; the weight gauges follow it."""
        table = self.state.read()
        if table.generation != self._shown:
            self._shown = table.generation
            self.metrics.show_arms(effective_split(table))
        return table

    def change(self, table: Table) -> Table:
        """Persist a new table; it is in force for the next request of every process."""
        self.state.write(table)
        return self.table

    # ---- start --------------------------------------------------------------------------------------------------

    async def start(self, engine: Any, models: Any, args: Any) -> None:
        """Load every arm into the engine and take over `generate`. Raises when an arm cannot be loaded:
        better no server than a wrong one.
        """
        self.engine, self.models, self.args = engine, models, args
        self.config.model = self.config.model or args.model
        check_flags(args, self.config, engine.model_config)
        prepare_state(self.config, self.state)
        if self.several:
            Sharing(self.directory, self.experiment)
        self.generate = wrap_generate(engine, self)
        for served in self.table.arms.values():
            if served.lora_id:
                await self.load(served)
        self.list_models()
        self.metrics.set_up()
        self.ready = True

    async def load(self, served: Served) -> None:
        """Put one adapter version into the engine; it stays there until `remove_lora`."""
        await self.engine.add_lora(lora_request(served))

    def list_models(self) -> None:
        """What vLLM lists and accepts as `model`: the alias, and the arms where clients may choose."""
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        names = [ALIAS, *(self.table.arms if self.config.expose_arms else ())]
        self.models.base_model_paths[:] = [BaseModelPath(name=name, model_path=ALIAS) for name in names]

    @property
    def fragile(self) -> bool:
        """A LoRA-enabled engine on CPU: scoring a prompt takes its rows for another batch's (bgmv in punica_cpu.py, vLLM 0.32.0)."""
        return bool(getattr(self.args, "enable_lora", False)) and on_cpu()

    def resolved(self) -> dict[str, Any]:
        """Adapters that trusted clients named below --adapter-root and that are in the engine, oldest first."""
        return {name: request for name, request in self.models.lora_requests.items() if "@" in name}

    @property
    def several(self) -> bool:
        """Whether other API-server processes share the engine: what is in flight there is not known here."""
        return (getattr(self.args, "api_server_count", None) or 1) > 1

    # ---- one request --------------------------------------------------------------------------------------------

    def trusted(self, token: str | None) -> bool:
        """Whether a request may choose its arm."""
        return self.config.expose_arms or self.token_valid(token)

    def token_valid(self, token: str | None) -> bool:
        return bool(self.config.token) and token is not None and hmac.compare_digest(token.encode(), self.config.token.encode())

    def choose(self, key: str | None) -> str:
        return choose_arm(effective_split(self.table), key)

    @contextmanager
    def busy(self, version: int) -> Iterator[None]:
        """Counts something that uses the engine with this adapter (0: none), so that swaps and retirements wait for it."""
        self.in_flight[version] += 1
        try:
            yield
        finally:
            self.in_flight[version] -= 1

    @contextmanager
    def hold(self, name: str) -> Iterator[Served]:
        """The arm's version for one whole request: a swap meanwhile changes nothing for it, and waits before retiring it.

        Raises:
            Unavailable: the arm cannot answer; never another arm instead.
        """
        served = self.available(name)
        if not served.arm.on_engine:
            yield served
            return
        with self.busy(served.lora_id):
            yield served

    def available(self, name: str) -> Served:
        """The arm, if it can answer now. Raises Unavailable."""
        table = self.table
        served = ENGINE_ITSELF if name == SWAPPED and table.swap else table.arms.get(name)
        if served is None:
            raise Unavailable(404, f"arm {name!r} is gone")
        if self.broken and served.arm.on_engine:
            raise Unavailable(503, "the engine's weights are in an unknown state after a failed swap; restart this server", name)
        if table.swap and served.arm.on_engine and served is not ENGINE_ITSELF:
            raise Unavailable(409, f"arm {name!r} cannot answer while a whole-model swap is in force; restore first", name)
        if name in self.failures:
            raise Unavailable(503, f"arm {name!r} failed; try again later", name)
        return served

    def log_failure(self, arm: str, error: BaseException) -> None:
        """An arm's failure in the log: its kind only, since messages may quote prompts."""
        logger.error("sku: arm %s failed with %s", arm, type(error).__name__)


def directory_of_this_process() -> Path:
    """For a server that was started by hand without `state`: private, and gone with the process."""
    path, _ = private_directory()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


# The engine's own weights under another name, for as long as a whole-model swap is in force.
ENGINE_ITSELF = Served(Arm(SWAPPED, "base"))


def effective_split(table: Table) -> dict[str, float]:
    """Weights as requests feel them: during a whole-model swap the engine's share belongs to the swapped weights."""
    if not table.swap:
        return table.split
    upstream = {name: weight for name, weight in table.split.items() if not table.arms[name].arm.on_engine}
    return {SWAPPED: 1 - sum(upstream.values()), **upstream}


def lora_request(served: Served) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=served.lora_name, lora_int_id=served.lora_id, lora_path=served.path)
