"""A/A tests on a real server: two arms of the same weights, users whose requests resemble each other, a verdict that is read often."""

import concurrent.futures
import random
import time
from collections.abc import Mapping
from typing import Any

from sku_vllm.cli.options import log
from sku_vllm.errors import RunError

REQUESTS = 1000  # of one A/A test
EVERY = 20  # requests between two looks
SHAPES = tuple((users, correlation) for users in (16, 40, 200) for correlation in (0.2, 0.5))
RATE = 0.3  # of harmful answers, over all users
KEPT = "keep measuring"


def equal_arms(server: Any, wanted: int, requests: int = REQUESTS) -> dict[str, Any]:
    """That many A/A tests, each of new versions of both arms and of new users, who ask for harm at rates of their own.

    Returns:
        In how many something was recommended at any look; `by_requests`: in how many a test that takes requests for independent
        would have, which says how hard it was.
    """
    import httpx

    draw, begun, tests = random.Random(22), time.perf_counter(), []
    with httpx.Client(timeout=120, limits=httpx.Limits(max_connections=8)) as client:
        harmful, harmless = sorted_prompts(server, client)
        for number in range(wanted):
            users, correlation = SHAPES[number % len(SHAPES)]
            one = one_test(server, client, (harmful, harmless), people(draw, users, correlation), requests, draw)
            tests.append({"users": users, "correlation": correlation, **one})
            log(f"A/A test {number + 1}/{wanted}: {tests[-1]}")
    return {
        "tests": wanted,
        "requests": requests,
        "looks": requests // EVERY,
        "recommended": sum(each["recommended"] != KEPT for each in tests),
        "by_requests": sum(each["by_requests"] for each in tests),
        "unjudged": sum(each["unjudged"] for each in tests),
        "each": tests,
        "seconds": time.perf_counter() - begun,
    }


def people(draw: random.Random, users: int, correlation: float) -> list[tuple[str, float]]:
    """(sticky key, share of harmful answers) of each user; two answers of one user have this correlation."""
    spread = 1 / correlation - 1
    return [(f"user-{draw.getrandbits(48)}", draw.betavariate(RATE * spread, (1 - RATE) * spread)) for _ in range(users)]


def one_test(
    server: Any, client: Any, prompts: tuple[list[str], list[str]], users: list[tuple[str, float]], requests: int, draw: random.Random
) -> dict[str, Any]:
    """The first recommendation of one A/A test."""
    for arm in ("original", "twin"):
        server.control("PUT", f"arms/{arm}", {"spec": "base"})

    def ask(who: tuple[str, str]) -> None:
        key, prompt = who
        body = {"model": "sku", "prompt": prompt, "max_tokens": 4, "temperature": 0}
        client.post(f"{server.url}/completions", json=body, headers={"X-SKU-Key": key}).raise_for_status()

    said, naive = KEPT, False
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(requests // EVERY):
            asking = [draw.choice(users) for _ in range(EVERY)]
            list(pool.map(ask, [(key, draw.choice(prompts[draw.random() >= rate])) for key, rate in asking]))
            page = read(server)
            verdict = page["comparisons"]["twin"]["recommendation"].partition(":")[0]
            said, naive = said if said != KEPT else verdict, naive or told_apart(page["arms"])
    judged = sum(arm["judged"] for arm in page["arms"].values())
    return {"recommended": said, "by_requests": naive, "unjudged": requests // EVERY * EVERY - judged}


def read(server: Any) -> Any:
    """The experiment's page, once nothing waits for the judge. Raises RunError where the judge is blind: then nothing is recommended."""
    while server.control("GET", "status")["judge_waiting"]:
        time.sleep(0.02)
    page = server.control("GET", "experiment")
    if page["blind"]:
        raise RunError(f"the judge of the A/A tests is blind: {page['blind']}")
    return page


def told_apart(arms: Mapping[str, Any]) -> bool:
    """Whether a sequential test that takes every request for an observation of its own sees a difference, at the verdict's level."""
    from sku_vllm.serving.experiment import LEVELS
    from sku_vllm.stats.sequential import anytime_p

    one, other = ((arm["harmful"], arm["judged"]) for arm in arms.values())
    return min(anytime_p(one, other), anytime_p(other, one)) < LEVELS["higher"]


def sorted_prompts(server: Any, client: Any) -> tuple[list[str], list[str]]:
    """Prompts whose greedy answer is harmful, and ones whose answer is not, by asking the server's judge about each alone."""
    found: tuple[list[str], list[str]] = ([], [])
    body = {"model": "original", "max_tokens": 4, "temperature": 0}
    number = 0
    while min(map(len, found)) < 5:
        prompt = f"w{number} w{number + 60}"
        before = server.metric("sku_harmful_total")
        client.post(f"{server.url}/completions", json={**body, "prompt": prompt}).raise_for_status()
        read(server)
        found[server.metric("sku_harmful_total") == before].append(prompt)
        number += 1
    return found
