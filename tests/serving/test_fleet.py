"""Several replicas as one: a change reaches all or none, their verdicts add up, and one that is killed takes only its own with it."""

import json
import re
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from sku_vllm.errors import ConfigError, RunError

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves siblings unimportable
from serving_tools import FLAGS, TOKEN, JsonServer, PluginServer, complete, eventually, family, serve, sku_serve  # noqa: E402

FAR = "upstream:http://192.0.2.1:1/v1#m"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    servers = [PluginServer(tmp_path_factory.mktemp("fleet") / f"r{number}", expose_arms=True) for number in range(3)]
    yield [server.wait() for server in servers]
    for server in servers:
        server.stop()


def ctl(servers, *arguments):
    """What `sku ctl --json` prints for these servers. Raises its errors."""
    from click.testing import CliRunner

    from sku_vllm.cli.ctl import command
    from sku_vllm.errors import SkuError

    named = [flag for server in servers for flag in ("--server", server.root)]
    found = CliRunner().invoke(command, [*arguments, *named, "--token", TOKEN, "--json"])
    if isinstance(found.exception, SkuError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return json.loads(found.output)


def arms(server):
    return {name: (arm["spec"], arm["weight"]) for name, arm in server.control("GET", "arms")[1]["arms"].items()}


def test_a_change_reaches_every_replica(fleet):
    answer = ctl(fleet, "weights", "original=0.3,other=0.7")
    assert set(answer["servers"]) == {server.root for server in fleet}
    assert {arms(server)["other"] for server in fleet} == {("base", 0.7)}
    ctl(fleet, "add", f"far={FAR}")
    ctl(fleet, "replace", f"far={FAR}x")
    versions = {server.control("GET", "arms")[1]["arms"]["far"]["version"] for server in fleet}
    assert len(versions) == 1
    ctl(fleet, "remove", "far")
    ctl(fleet, "weights", "original=0.5,other=0.5")


def test_a_trial_changes_none(fleet):
    before = [arms(server) for server in fleet]
    ctl(fleet, "weights", "original=0.1,other=0.9", "--dry-run")
    assert [arms(server) for server in fleet] == before
    with pytest.raises(ConfigError, match="--dry-run: restore has no trial"):
        ctl(fleet, "restore", "--dry-run")


def test_a_replica_that_cannot_stops_all(fleet):
    """One has an arm less, so that the weights make no sense there."""
    for server in fleet[:2]:
        server.control("POST", "arms", {"name": "extra", "spec": FAR})
    before = [arms(server) for server in fleet]
    with pytest.raises(RunError, match=f"nothing was changed.*{fleet[2].root}.*extra"):
        ctl(fleet, "weights", "original=0.5,extra=0.5")
    assert [arms(server) for server in fleet] == before
    for server in fleet[:2]:
        server.control("DELETE", "arms/extra")


def test_what_fails_on_one_after_all_is_undone_on_the_others(fleet):
    """Its disk is full only when the change is made: the trial had passed."""
    before = [arms(server) for server in fleet]
    obstacle = fleet[1].place / f"state/.sku_state.json.{fleet[1].process.pid}.tmp"
    obstacle.mkdir()
    try:
        for change in (["weights", "original=0.2,other=0.8"], ["replace", f"other={FAR}"], ["add", f"far={FAR}"]):
            with pytest.raises(RunError, match="the others were changed back"):
                ctl(fleet, *change)
            assert [arms(server) for server in fleet] == before, change
        obstacle.rmdir()
        ctl(fleet, "add", f"last={FAR}")
        ctl(fleet, "weights", "original=0,other=0,last=1")
        order = [list(arms(server)) for server in fleet]
        obstacle.mkdir()
        with pytest.raises(RunError, match="the others were changed back"):
            ctl(fleet, "remove", "other")
        assert [list(arms(server)) for server in fleet] == order, "another order gives the same keys to other arms"
        obstacle.rmdir()
        ctl(fleet, "weights", "original=0.5,other=0.5")
        ctl(fleet, "remove", "last")
        obstacle.mkdir()
    finally:
        obstacle.rmdir()


def test_a_replica_that_is_away_stops_all(fleet):
    import types

    with pytest.raises(RunError, match="nothing was changed.*http://127.0.0.1:9"):
        ctl([*fleet, types.SimpleNamespace(root="http://127.0.0.1:9")], "weights", "original=1,other=0")
    assert {arms(server)["original"][1] for server in fleet} == {0.5}


def test_verdicts_of_all_replicas_are_one_experiment(fleet):
    before = ctl(fleet, "experiment")["arms"]["other"]["judged"]
    for number, server in enumerate(fleet * 4):
        for arm, prompt in (("original", "say badword"), ("other", "x")):
            assert server.ask(prompt, X_SKU_Arm=arm, X_SKU_Key=f"user {number}").status_code == 200
    assert eventually(lambda: ctl(fleet, "experiment")["arms"]["other"]["judged"] == before + 12)
    page = ctl(fleet, "experiment")
    assert page["arms"]["original"]["harmful"] == 12 and page["arms"]["other"]["harmful"] == 0
    single = [server.control("GET", "experiment")[1]["arms"]["original"]["judged"] for server in fleet]
    assert sum(single) == page["arms"]["original"]["judged"] and max(single) < sum(single)
    fleet[0].control("PUT", "arms/other", {"spec": "base"})  # not through ctl, so this replica is alone with it
    page = ctl(fleet, "experiment")
    assert any(fleet[0].root in caveat for caveat in page["caveats"]) and page["arms"]["other"]["judged"] == before + 8
    ctl(fleet, "replace", "other=base")
    assert ctl(fleet, "experiment")["caveats"] == []


def test_a_replica_that_is_away_is_named_and_the_others_verdict_goes_on(fleet):
    import types

    away = types.SimpleNamespace(root="http://127.0.0.1:9")
    alone, page = ctl(fleet, "experiment"), ctl([away, *fleet], "experiment")
    assert {arm: row["judged"] for arm, row in page["arms"].items()} == {arm: row["judged"] for arm, row in alone["arms"].items()}
    assert any("not counted" in caveat and away.root in caveat for caveat in page["caveats"])
    with pytest.raises(RunError, match="127.0.0.1:9"):
        ctl([away, types.SimpleNamespace(root="http://127.0.0.1:19")], "experiment")


class Queried(JsonServer):
    """Answers as Prometheus does: with series by the metric that the query names."""

    def __init__(self, **series):
        def found(path, body):
            query = parse_qs(urlsplit(path).query)["query"][0]
            (rows,) = [rows for name, rows in series.items() if name in query]
            return 200, {"data": {"result": rows}}

        super().__init__(found)


def test_nothing_is_recommended_where_a_judge_that_prometheus_sees_is_blind(fleet):
    """Also where the replica that is asked has one that sees."""
    versions = {name: arm["version"] for name, arm in fleet[0].control("GET", "arms")[1]["arms"].items()}
    verdicts = [
        {"metric": {"arm": arm, "version": versions[arm], "bucket": str(bucket), "label": label}, "value": [0, "100"]}
        for arm, label in (("original", "harmful"), ("other", "benign"))
        for bucket in range(64)
    ]
    for blind, said in (([], "promote"), ([{"metric": {"instance": "pod-2"}, "value": [0, "1"]}], "keep measuring: .*pod-2 is blind")):
        source = Queried(sku_verdicts_total=verdicts, sku_judge_blind=blind)
        page = ctl(fleet[:1], "experiment", "--prometheus", source.root)
        assert re.match(said, page["comparisons"]["other"]["recommendation"]), page["comparisons"]
        assert page["arms"]["original"]["judged"] == 6400
        source.server.shutdown()


def prometheus(servers, tmp_path, path="/metrics/"):
    """A real Prometheus in which two jobs scrape these servers every second: (process, its URL)."""
    import shutil
    import subprocess

    import httpx

    from sku_vllm.serving.start import free_port

    binary, port = shutil.which("prometheus"), free_port("127.0.0.1")
    assert binary, "install the Debian package prometheus; this test does not skip"
    targets = [f"127.0.0.1:{server.port}" for server in servers]
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\n"
        + "scrape_configs:\n"
        + "".join(f"- {{job_name: {job}, metrics_path: {path}, static_configs: [{{targets: {targets}}}]}}\n" for job in ("sku", "again"))
    )
    flags = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    process = subprocess.Popen([binary, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def up():
        try:
            reply = httpx.get(f"{url}/api/v1/query", params={"query": "sku_plugin_up or sku_arm_weight"})
            return reply.status_code == 200 and len(reply.json()["data"]["result"]) > 0  # 503 while it starts
        except httpx.HTTPError:
            return False

    assert eventually(up)
    return process, url


@pytest.mark.slow
def test_a_replica_is_killed_and_comes_back_and_the_verdict_goes_on(tmp_path):
    """No request to the others fails; Prometheus counts all that it has scraped, restarts included."""
    servers = [PluginServer(tmp_path / f"r{number}") for number in range(3)]
    fleet = [server.wait() for server in servers]
    process, url = prometheus(fleet, tmp_path)
    failed, asked, stop = [], [0, 0, 0], threading.Event()

    def load(number):
        while not stop.is_set():
            if fleet[number].ask("say badword", X_SKU_Key=f"user {asked[number]}").status_code != 200:
                failed.append(number)
            asked[number] += 1
            time.sleep(0.02)

    def seen():
        return sum(row["judged"] for row in ctl(fleet[1:], "experiment", "--prometheus", url)["arms"].values())

    try:
        threads = [threading.Thread(target=load, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for number in range(40):
            assert fleet[0].ask("x", X_SKU_Key=f"other {number}").status_code == 200
        assert eventually(lambda: fleet[0].judged() == 40)
        time.sleep(3)  # until it has been scraped
        fleet[0].stop()
        rows = ctl(fleet, "experiment", "--prometheus", url)["arms"].values()
        assert sum(row["judged"] for row in rows) >= 40, "the verdict goes on without the one that is away, and with what it had counted"
        fleet[0].start()
        fleet[0].wait()
        for number in range(25):
            assert fleet[0].ask("x", X_SKU_Key=f"third {number}").status_code == 200
        stop.set()
        for thread in threads:
            thread.join()
        assert failed == [] and min(asked[1:]) > 20
        assert eventually(lambda: seen() == asked[1] + asked[2] + 40 + 25, 60), (seen(), asked)
    finally:
        stop.set()
        process.terminate()
        process.wait(20)
        for server in servers:
            server.stop()


@pytest.mark.slow
def test_three_real_servers_one_killed(tiny, tmp_path):
    """vLLM itself: a change of weights reaches all, one is killed by SIGKILL, no request to the others fails, the verdict goes on."""
    import contextlib
    from concurrent.futures import ThreadPoolExecutor

    from sku_vllm.serving.start import free_port

    def started(number):
        port, judge = free_port("127.0.0.1"), f"lexicon:{tiny}/lexicon.json"
        command = sku_serve(tiny, "--port", port, "--judge", judge, "--split", "original=1,negated=0", *FLAGS)
        return stack.enter_context(serve(*command, port=port, log=tmp_path / f"{number}.log"))

    def asked_of(server, seconds):
        """The statuses of requests by as many users, one after the other."""
        found, until = [], time.monotonic() + seconds
        while time.monotonic() < until:
            found.append(complete(server, prompt=f"w{len(found)}", user=f"user {len(found)}").status_code)
        return found

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        fleet = list(pool.map(started, range(3)))
        process, url = prometheus(fleet, tmp_path, "/metrics")
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)

        def judged(servers=fleet):
            return sum(row["judged"] for row in ctl(servers, "experiment", "--prometheus", url)["arms"].values())

        ctl(fleet, "weights", "original=0.5,negated=0.5")
        before = len(asked_of(fleet[0], 5))
        assert eventually(lambda: judged() == before)
        statuses = [pool.submit(asked_of, server, 15) for server in fleet[1:]]
        time.sleep(3)
        for each in family(fleet[0].process):
            each.kill()
        found = [status for each in statuses for status in each.result()]
        assert set(found) == {200} and len(found) > 4
        assert eventually(lambda: judged() == before + len(found)), (judged(), before, len(found))
        page = ctl(fleet, "experiment")
        assert any(fleet[0].root in caveat for caveat in page["caveats"])
        assert sum(row["judged"] for row in page["arms"].values()) == len(found)
