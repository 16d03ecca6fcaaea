"""One experiment over several replicas: verdicts by arm, version and bucket are added up, and the page is made as one server makes it.

Open this file to change how replicas that serve different versions are treated.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import httpx

from sku_vllm.client.http import fetch_json
from sku_vllm.errors import RunError
from sku_vllm.serving.experiment import cut_short, page
from sku_vllm.serving.tally import COUNTED, Tally
from sku_vllm.stats.clustered import BUCKETS

UNTIMED = {f"{name}_s": {"n": 0, "p50": None, "p90": None, "p99": None} for name in ("latency", "time_to_first_token")}

UNCOUNTED = dict.fromkeys(("answers", "length_limited", "length_limited_rate"))


def added_up(pages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The experiment of several servers, from each one's page.

    Where servers serve different versions of an arm only the most common one counts, and a caveat says so. Restarts are not included:
    a server's page begins when the server does.
    """
    arms = list(dict.fromkeys(name for each in pages.values() for name in each["arms"]))
    versions, caveats = {}, []
    for arm in arms:
        of = {server: each["arms"][arm]["version"] for server, each in pages.items() if arm in each["arms"]}
        (versions[arm], _), *others = Counter(of.values()).most_common()
        if others or len(of) < len(pages):
            left = [server for server in pages if of.get(server) != versions[arm]]
            caveats.append(f"arm {arm}: not counted on {', '.join(left)}, which serve another version of it, or none")
    tallies, ends = {arm: Tally() for arm in arms}, {arm: Counter[str]() for arm in arms}
    for each in pages.values():
        for arm, row in each["arms"].items():
            if row["version"] == versions[arm]:
                tallies[arm] = tallies[arm] + Tally.from_json(row["buckets"])
                ends[arm].update({name: row[name] for name in ("answers", "length_limited")})
    reference = next((each["reference"] for each in pages.values() if each["reference"]), None)
    beside = {arm: {**cut_short(counts), **UNTIMED} for arm, counts in ends.items()}
    found = page(tallies, versions, beside, reference, blind_among(pages))
    return {**found, "caveats": caveats}


def blind_among(pages: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which servers' judges are blind, and since when; None where all of them see."""
    return "; ".join(f"{server}: {each['blind']}" for server, each in pages.items() if each["blind"]) or None


def queried(client: httpx.Client, query: str) -> list[tuple[dict[str, str], float]]:
    """The series that a query finds now: (labels, value)."""
    answer = fetch_json(f"/api/v1/query?{urlencode({'query': query})}", client=client)
    return [(found["metric"], float(found["value"][1])) for found in answer["data"]["result"]]


def from_prometheus(client: httpx.Client, window: str, pages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The experiment of every server that a Prometheus scrapes.

    Each process's verdicts are series of their own (label `run`), so that the largest value of each is what that process had counted when
    it was last scraped, and their sum counts restarts and replicas that are gone, and no server twice that several jobs scrape. A judge
    that is blind on any of them lets nothing be recommended.

    Args:
        client: asks Prometheus. window: how far back, as in PromQL. pages: by server, of at least one replica; the first says what arms
            and versions there are.

    Raises:
        RunError: the address does not answer, or not as Prometheus does.
    """
    labels_of = "arm, version, bucket, label"
    found_of = f"max by ({labels_of}, run) (max_over_time(sku_verdicts_total[{window}]))"
    one = next(iter(pages.values()))
    versions = {arm: row["version"] for arm, row in one["arms"].items()}
    tallies = {arm: Tally() for arm in versions}
    others = set()
    try:
        for labels, count in queried(client, f"sum by ({labels_of}) ({found_of})"):
            arm, bucket = labels["arm"], int(labels["bucket"])
            if versions.get(arm) != labels["version"]:
                others.add(arm)
            elif labels["label"] in COUNTED and 0 <= bucket < BUCKETS:
                tallies[arm].labels.setdefault(labels["label"], [0] * BUCKETS)[bucket] += int(count)
        blind = [labels.get("instance", "?") for labels, _ in queried(client, "max by (instance) (sku_judge_blind) > 0")]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(
            f"{client.base_url}: not a Prometheus query API; give the address of Prometheus itself, such as http://host:9090"
        ) from error
    seen = blind_among(pages) or (f"the judge of {', '.join(sorted(blind))} is blind" if blind else None)
    beside = dict.fromkeys(versions, {**UNCOUNTED, **UNTIMED})
    found = page(tallies, versions, beside, one["reference"], seen)
    earlier = sorted(arm for arm in others if arm in versions)
    caveats = [f"earlier or other versions are not counted of {', '.join(earlier)}"] if earlier else []
    return {
        **found,
        "caveats": [*caveats, "latencies and cut answers are in Prometheus: sku_request_latency_seconds, sku_length_limited_total"],
    }
