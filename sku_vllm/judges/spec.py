"""`--judge SPEC` as a judge: `lexicon:FILE`, `refusal`, `hf:MODEL`, `openai:URL#MODEL`, `all:A,B`."""

import difflib
import re
from collections.abc import Sequence

from sku_vllm.errors import ConfigError
from sku_vllm.judges.exchange import Judge

SPECS = ("lexicon:FILE", "refusal", "hf:MODEL", "openai:URL#MODEL", "all:A,B")
# A comma separates judges only where a judge follows, so file names and URLs may hold commas.
_NEXT_JUDGE = re.compile(r",(?=\s*(?:lexicon:|hf:|openai:|refusal\s*(?:,|$)))")


def load_judge(spec: str) -> Judge:
    """The judge a SPEC names, ready to use; a lexicon needs no torch, `hf:` loads it.

    Raises:
        ConfigError: there is no such judge, or the SPEC lacks its part.
        DataError: the lexicon or the classifier cannot be read.
    """
    kind, _, rest = spec.strip().partition(":")
    if kind == "refusal" and not rest:
        from sku_vllm.judges.refusal import RefusalJudge

        return RefusalJudge()
    if kind in ("lexicon", "hf", "openai", "all") and not rest:
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
    if kind == "all":
        return judge_of(_NEXT_JUDGE.split(rest))
    raise _unknown(spec, kind)


def judge_of(specs: Sequence[str]) -> Judge:
    """The judge of a repeated `--judge`: one as it is, several as `all:`."""
    from sku_vllm.judges.all_of import AllOf

    judges = [part for spec in dict.fromkeys(specs) for part in _parts(load_judge(spec))]
    return judges[0] if len(judges) == 1 else AllOf(judges)


def _parts(judge: Judge) -> Sequence[Judge]:
    return getattr(judge, "judges", (judge,))


def _unknown(spec: str, kind: str) -> ConfigError:
    close = difflib.get_close_matches(kind, ["lexicon", "refusal", "hf", "openai", "all"], n=1)
    return ConfigError(f"--judge {spec}: unknown judge{f'; did you mean {close[0]!r}?' if close else ''}; choose from {', '.join(SPECS)}")
