"""Parses `--judge SPEC`: one of `SPECS`, or a judge that another package brings."""

import difflib
import re
from collections.abc import Callable, Sequence

from sku_vllm.errors import ConfigError, SkuError
from sku_vllm.extensions import JUDGES, extension_names, load_extension
from sku_vllm.judges.exchange import Judge

SPECS = ("lexicon:FILE", "refusal", "answered", "hf:MODEL", "openai:URL#MODEL", "python:MODULE:CLASS", "all:A,B")
KINDS = tuple(spec.partition(":")[0] for spec in SPECS)


def judge_specs(*, live: bool = False) -> list[str]:
    """Every form of SPEC that works here, for help and errors: the built-in ones, then those of installed packages.

    live: only those that can judge traffic, whose prompts belong to no forget set.
    """
    own = [spec for spec in SPECS if not (live and spec == "answered")]
    return [*own, *(f"{name}:…" for name in extension_names(JUDGES) if name not in KINDS)]


def load_judge(spec: str, *, live: bool = False) -> Judge:
    """The judge a SPEC names, ready to use; a lexicon needs no torch, `hf:` loads it.

    A name that is not built in is looked up among the entry points `sku_vllm.judges` of installed packages; see `Judge`.

    Args:
        live: it is to judge traffic, whose prompts belong to no forget set.

    Raises:
        ConfigError: there is no such judge, nothing follows the colon, another package's judge cannot be created, or one for forget
            prompts alone (`answered`) is to judge live traffic.
        DataError: the lexicon or the classifier cannot be read.
    """
    judge = _named(spec)
    if live and (only := [part.name for part in _parts(judge) if getattr(part, "forget_only", False)]):
        raise ConfigError(
            f"--judge {spec}: {only[0]} calls every answer harmful that does not refuse, and live traffic has no forget set that should be "
            "refused; use lexicon:, hf: or openai: with a guard"
        )
    return judge


def _named(spec: str) -> Judge:
    kind, _, rest = spec.strip().partition(":")
    if kind == "refusal" and not rest:
        from sku_vllm.judges.refusal import RefusalJudge

        return RefusalJudge()
    if kind == "answered" and not rest:
        from sku_vllm.judges.answered import AnsweredJudge

        return AnsweredJudge()
    if kind in ("lexicon", "hf", "openai", "python", "all") and not rest:
        wanted = next(example for example in SPECS if example.startswith(kind))
        raise ConfigError(f"--judge {spec}: nothing after {kind!r}; write {wanted}")
    if kind == "lexicon":
        from sku_vllm.judges.lexicon import read_lexicon

        return read_lexicon(rest)
    if kind == "hf":
        from sku_vllm.judges.classifier import load_classifier

        return load_classifier(rest)
    if kind == "openai":
        from sku_vllm.judges.endpoint import endpoint_judge

        return endpoint_judge(rest)
    if kind == "python":
        return _made(spec, *_imported(spec, rest))
    if kind == "all":
        return judge_of(_split(rest))
    if kind in KINDS:  # refusal:SOMETHING or answered:SOMETHING
        raise _unknown(spec, kind)
    return _extension(spec, kind, rest)


def judge_of(specs: Sequence[str]) -> Judge:
    """The judge of one or several `--judge` options; several are combined as by `all:`. Raises what `load_judge` raises."""
    from sku_vllm.judges.all_of import AllOf

    judges = [part for spec in dict.fromkeys(specs) for part in _parts(load_judge(spec))]
    return judges[0] if len(judges) == 1 else AllOf(judges)


def with_options(spec: str, concurrency: int | None, timeout: float | None) -> str:
    """A SPEC whose `openai:` judge gets what `--judge-concurrency` and `--judge-timeout` say, unless it says so itself."""
    if not spec.strip().startswith("openai:") or (concurrency is None and timeout is None):
        return spec
    query = spec.rpartition("#")[2].partition("?")[2]
    given = {key: value for key, value in (("concurrency", concurrency), ("timeout", timeout)) if value is not None}
    more = "&".join(f"{key}={value:g}" for key, value in given.items() if f"{key}=" not in query)
    return spec + (("&" if query else "?") + more if more else "")


def _parts(judge: Judge) -> Sequence[Judge]:
    return getattr(judge, "judges", (judge,))


def _split(specs: str) -> list[str]:
    """The SPECs of `all:`. A comma separates judges only where a judge follows, so file names and URLs may hold commas."""
    brought = (rf"{re.escape(name)}\s*(?::|,|$)" for name in extension_names(JUDGES))
    judge = "|".join(["lexicon:", "hf:", "openai:", "python:", r"(?:refusal|answered)\s*(?:,|$)", *brought])
    return re.split(rf",(?=\s*(?:{judge}))", specs)


def _extension(spec: str, name: str, rest: str) -> Judge:
    try:
        make = load_extension(JUDGES, name)
    except KeyError:
        raise _unknown(spec, name) from None
    return _made(spec, make, (rest,))


def _imported(spec: str, rest: str) -> tuple[Callable[..., Judge], tuple[str, ...]]:
    """What makes the judge of `python:MODULE:CLASS[:REST]`, and what it is called with."""
    import importlib
    import sys

    module, _, name = rest.partition(":")
    name, colon, more = name.partition(":")
    if not module or not name:
        raise ConfigError(f"--judge {spec}: write python:MODULE:CLASS, or python:MODULE:CLASS:REST where the class takes a text")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: a module beside the data is found
    try:
        return getattr(importlib.import_module(module), name), (more,) if colon else ()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--judge {spec}: {error}; is it in this directory or on PYTHONPATH?") from error
    except Exception as error:  # somebody's own code may raise anything
        raise ConfigError(f"--judge {spec}: {module} cannot be imported ({type(error).__name__}: {error})") from error


def _made(spec: str, make: Callable[..., Judge], arguments: tuple[str, ...]) -> Judge:
    try:
        judge = make(*arguments)
    except SkuError:
        raise
    except Exception as error:  # another package's code may raise anything
        raise ConfigError(f"--judge {spec}: cannot be made ({type(error).__name__}: {error}); see the package that brings it") from error
    if not (isinstance(getattr(judge, "name", None), str) and callable(getattr(judge, "judge", None))):
        raise ConfigError(f"--judge {spec}: its package gives a {type(judge).__name__} without `name` or `judge`; it has to fix that")
    return judge


def _unknown(spec: str, kind: str) -> ConfigError:
    close = difflib.get_close_matches(kind, [*KINDS, *extension_names(JUDGES)], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ConfigError(f"--judge {spec}: unknown judge{hint}; choose from {', '.join(judge_specs())}")
