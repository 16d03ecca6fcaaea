"""The state of one API-server process: routing table, engine, judge, failed arms and requests in flight.

The plugin creates one `Runtime`; middleware, engine wrapper and control API share it.
"""

import asyncio
import atexit
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sku_vllm.judges import Verdict
from sku_vllm.serving.address import mark_of
from sku_vllm.serving.arm_adapter import ArmAdapter, write_arm_adapter
from sku_vllm.serving.arms import ALIAS, SWAPPED, Arm
from sku_vllm.serving.audit import AuditLog, audit_path, in_force
from sku_vllm.serving.experiment import Experiment
from sku_vllm.serving.initial_state import prepare_state
from sku_vllm.serving.judge_process import JudgeProcess
from sku_vllm.serving.judge_queue import Answer, JudgeQueue
from sku_vllm.serving.lora_series import forget_lora_series
from sku_vllm.serving.metrics import metrics
from sku_vllm.serving.private_directory import private_directory
from sku_vllm.serving.rollback import Rollback, parse_rule
from sku_vllm.serving.route import Route
from sku_vllm.serving.routing import choose_arm
from sku_vllm.serving.serve_config import ServeConfig
from sku_vllm.serving.shared_experiment import SharedExperiment
from sku_vllm.serving.state import Served, StateFile, Table
from sku_vllm.serving.traffic import Unavailable, answering, effective_split, lora_request, versions
from sku_vllm.serving.vllm_flags import check_flags, on_cpu, served_names

logger = logging.getLogger("vllm.sku")


class Runtime:
    """The state of one process. The routing table is shared by all processes; failures and requests in flight are per process."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.metrics = metrics()
        self.directory = Path(config.state or config.run or directory_of_this_process())
        self.state = StateFile(self.directory)
        self.experiment = Experiment()
        rule = parse_rule(config.rollback_if) if config.rollback_if else None
        watching = rule or config.drift
        self.audit = AuditLog(audit_path(config))
        self.rollback = Rollback(self.state, self._guarded, rule, config.drift, self.experiment.total) if watching else None
        self.judge = JudgeQueue(
            JudgeProcess(config.judge) if config.judge else None,
            self.metrics,
            sample=config.judge_sample,
            size=config.judge_queue,
            keep=config.keep_judged,
            found=self._judged,
        )
        self.failures: dict[str, str] = {}
        self.broken: str | None = None  # why the engine's own weights cannot be trusted
        self.in_flight: Counter[int] = Counter()  # uses by adapter id, of HTTP and engine requests; 0 is the engine without adapter
        self.requests = 0  # requests that are being answered, each counted once
        self.tokens = config.tokens()
        self.aliases: tuple[str, ...] = tuple(config.alias) or (ALIAS,)
        self.upstream_keys = config.upstream_secrets()
        self.mark = ""  # names this server in requests that it sends on
        self.gate = asyncio.Event()  # cleared during a whole-model swap: new requests wait for it instead of failing
        self.gate.set()
        self.engine: Any = None
        self.generate: Any = None  # the engine's unwrapped `generate`, which does no routing
        self.models: Any = None
        self.args: Any = None
        self.ready = False
        self.closing = False  # SIGTERM has come: running requests are answered, new ones refused
        self.relays: set[asyncio.Task[None]] = set()  # requests that wait for another server
        self.following: dict[str, Any] | None = None  # the file that arms and weights follow, and whether they do
        self._shown = 0
        self._session: Any = None

    def _judged(self, answer: Answer, verdict: Verdict) -> None:
        if versions(self.table).get(answer.arm) != answer.version:
            return  # the arm was replaced while its answer waited for the judge
        self.experiment.judged(answer.arm, verdict, answer.version, answer.bucket)
        self.metrics.count_verdict(answer.arm, answer.version, answer.bucket, verdict)
        if self.rollback and not self.judge.health.blind():
            self.rollback.look(answer.arm)

    def _guarded(self, table: Table) -> Table:
        """Make the table of a rollback current, and write down that the guard did it."""
        before = in_force(self.table, self.judge.sample)
        changed = self.change(table)
        self.audit.write("guard", table.notes[-1], before, in_force(changed, self.judge.sample))
        return changed

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
        """The current routing table, as every process sees it. When it has changed, so have the weights and versions in the metrics."""
        table = self.state.read()
        if table.generation != self._shown:
            self._shown = table.generation
            self.metrics.show_arms(effective_split(table))
            for (arm, version), tally in self.experiment.keep(versions(table)).items():
                self.metrics.forget_verdicts(arm, version, tally)
        return table

    def change(self, table: Table) -> Table:
        """Write a new table to the state file; every process uses it from its next request on."""
        self.state.write(table)
        return self.table

    # ---- start --------------------------------------------------------------------------------------------------

    async def start(self, engine: Any, generate: Any, models: Any, args: Any) -> None:
        """Load every arm's adapter into the engine. When one cannot be loaded, vLLM's error ends the server.

        Args:
            engine: vLLM's engine client. generate: its unwrapped `generate`, for probes.
            models: vLLM's list of models. args: its parsed flags.
        """
        self.engine, self.generate, self.models, self.args = engine, generate, models, args
        self.config.model = self.config.model or args.model
        self.aliases = served_names(args, self.config)
        self.mark = mark_of(args)
        check_flags(args, self.config, engine.model_config)
        prepare_state(self.config, self.state)
        if self.several:
            SharedExperiment(self.directory, self.experiment)
        for served in self.table.arms.values():
            if served.lora_id:
                await self.load(served)
        self.list_models()
        self.metrics.set_up()
        self.ready = True

    async def write_adapter(self, arm: Arm, folder: str) -> ArmAdapter:
        """The arm's negated adapter, below `folder` of this server's directory. Raises InputError where it cannot be served."""
        config, place = self.config, self.directory / folder
        return await asyncio.to_thread(write_arm_adapter, arm, config.model, place, revision=config.revision, any_base=config.any_base)

    async def load(self, served: Served) -> None:
        """Put one adapter version into the engine; it stays there until `unload`."""
        await self.engine.add_lora(lora_request(served))

    async def unload(self, served: Served) -> None:
        """Take one adapter version out of the engine, and out of vLLM's metrics."""
        await self.engine.remove_lora(served.lora_id)
        forget_lora_series(served.lora_name)

    def list_models(self) -> None:
        """Set the names vLLM lists and accepts as `model`: the aliases, and with --expose-arms the arms.

        Their `root` is the base's path, where benchmark tools look for the tokenizer.
        """
        from vllm.entrypoints.openai.models.protocol import BaseModelPath

        names = [*self.aliases, *(self.table.arms if self.config.expose_arms else ())]
        self.models.base_model_paths[:] = [BaseModelPath(name=name, model_path=self.args.model) for name in names]

    @property
    def fragile(self) -> bool:
        """Whether prompt log-probabilities would crash the engine, as they do with LoRA on CPU when requests share a batch.

        The LoRA kernel is then given the wrong number of rows (bgmv in punica_cpu.py, vLLM 0.32.0).
        """
        return bool(getattr(self.args, "enable_lora", False)) and on_cpu()

    def resolved(self) -> dict[str, Any]:
        """Adapters that trusted clients named below --adapter-root and that are in the engine, oldest first."""
        return {name: request for name, request in self.models.lora_requests.items() if "@" in name}

    @property
    def several(self) -> bool:
        """Whether other API-server processes share the engine; this process does not know their requests in flight."""
        return (getattr(self.args, "api_server_count", None) or 1) > 1

    # ---- one request --------------------------------------------------------------------------------------------

    def token_valid(self, token: str | None) -> bool:
        """Whether this token may change the server; False where the server has none."""
        holder = self.tokens.holder(token)
        return holder is not None and holder.changes

    def choose(self, key: str | None) -> str:
        """The arm that answers a request with this sticky key (None: a random one, by weight)."""
        return choose_arm(effective_split(self.table), key)

    @contextmanager
    def busy(self, version: int | None, route: Route) -> Iterator[None]:
        """Count the block as a use of this adapter id (0: the engine without adapter); swaps and unloading wait until it ends.

        version: None where another server answers. route: the HTTP request that the block belongs to.
        """
        if version is not None:
            self.in_flight[version] += 1
        route.users += 1
        self.requests += route.users == 1
        try:
            yield
        finally:
            if version is not None:
                self.in_flight[version] -= 1
            route.users -= 1
            self.requests -= route.users == 0

    def available(self, name: str) -> Served:
        """The arm, if it can answer now; no other arm takes its place. Raises Unavailable."""
        table = self.table
        served = answering(table, name)
        if served is None:
            raise Unavailable(404, f"arm {name!r} is gone")
        if served.arm.on_engine:
            self.check_engine(name)
        if table.swap and served.arm.on_engine and name != SWAPPED:
            raise Unavailable(409, f"arm {name!r} cannot answer while a whole-model swap is in force; restore first", name)
        if name in self.failures:
            raise Unavailable(503, f"arm {name!r} failed; try again later", name)
        return served

    def check_engine(self, arm: str | None = None) -> None:
        """Raise Unavailable where the engine's own weights cannot be trusted."""
        if self.broken:
            raise Unavailable(503, "the engine's weights are in an unknown state after a failed swap; restart this server", arm)

    def log_failure(self, arm: str, why: BaseException | str) -> None:
        """Log why an arm failed: a text as it is, of an exception its type only, since its message may quote prompts."""
        logger.error("sku: %s", why if isinstance(why, str) else f"arm {arm} failed with {type(why).__name__}")


def directory_of_this_process() -> Path:
    """A private directory that is removed when this process exits, for a vLLM started by hand without `state`."""
    path, _ = private_directory()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
