"""Profiles of guard models: what each is asked, and how its reply is read. One YAML file a guard, in `guards/`.

    says: what it is, in a sentence (shown nowhere but to the reader of the file)
    models: regular expression, searched in the model's name; '' for none
    system, prompt: texts with {prompt}, {response} and {policy}; without `prompt` the guard gets the conversation's own turns
    after: the user's turn that follows these
    policy: text for {policy}; `?policy=FILE` in the SPEC replaces it
    tokens: longest reply. body: further fields of the request. choice: words of which the reply has to be one
    verdict: words, yes-no, rubric, or a regular expression with the group `value` (`sku_vllm.judges.guard_reply`)
    values: {what the group may hold, in lower case: harmful or harmless}
    refusal, category: regular expressions with the group `value`; an answer is a refusal where it is "yes" or holds "refusal", and a
        partial one, which is counted apart, where it holds "partial" too
    forget_only: true where whatever is answered counts as harmful, so that only answers to forget prompts can be

A user's own profile is such a file: `--judge openai:URL#MODEL?guard=FILE.yaml`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from sku_vllm.errors import ConfigError
from sku_vllm.judges.exchange import Exchange

FOLDER = Path(__file__).with_name("guards")
GRAMMARS = ("words", "yes-no", "rubric")
# The general profiles, tried when no other fits.
LAST = ("other-guard", "chat")
_FIELD = re.compile(r"\{(prompt|response|policy)\}")
SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool", "developer": "System"}


@dataclass(frozen=True, slots=True)
class Guard:
    """One profile; the fields are those of its file, see above."""

    name: str
    says: str = ""
    models: str = ""
    system: str = ""
    prompt: str = ""
    after: str = ""
    policy: str = ""
    tokens: int = 64
    body: Mapping[str, Any] = field(default_factory=dict)
    choice: tuple[str, ...] = ()
    verdict: str = "words"
    values: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""
    category: str = ""
    forget_only: bool = False

    def messages(self, exchange: Exchange) -> list[dict[str, str]]:
        """The chat messages that put one exchange to the guard, all turns of its conversation included."""
        system = [{"role": "system", "content": self._filled(self.system, exchange)}] if self.system else []
        if not self.prompt:
            asked = [{"role": "user", "content": self._filled(self.after, exchange)}] if self.after else []
            return [*system, *exchange.conversation, {"role": "assistant", "content": exchange.response}, *asked]
        return [*system, {"role": "user", "content": self._filled(self.prompt, exchange)}]

    def _filled(self, text: str, exchange: Exchange) -> str:
        turns = exchange.conversation
        plain = len(turns) == 1 and turns[0]["role"] == "user"
        asked = exchange.prompt if plain else "\n\n".join(f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in turns)
        told = {"prompt": asked, "response": exchange.response, "policy": self.policy}
        return _FIELD.sub(lambda found: told[found[1]], text)  # in one pass: an answer may hold "{prompt}"


def guard_for(model: str, options: Mapping[str, str], spec: str) -> Guard:
    """The profile of a model: the one that `options["guard"]` names (a name or a file), else the one whose `models` finds its name.

    options: also `policy` (a file), and a word of the profile's `values` → harmful or harmless.

    Raises:
        ConfigError: no such profile or file, a broken one, or an option that the profile has no use for.
    """
    wanted = options.get("guard")
    if wanted is None:
        found = next(guard for guard in guards().values() if guard.name == "chat" or (guard.models and _finds(guard.models, model)))
    elif wanted in guards():
        found = guards()[wanted]
    elif Path(wanted).is_file():
        found = read_guard(Path(wanted))
    else:
        raise ConfigError(f"--judge {spec}: no guard {wanted!r}; name a YAML file, or one of {', '.join(guards())}")
    changes: dict[str, Any] = {}
    for key, value in options.items():
        if key == "policy" and found.policy:
            changes["policy"] = _read(Path(value), spec)
        elif key in found.values and value in ("harmful", "harmless"):
            changes["values"] = {**changes.get("values", found.values), key: value}
        elif key != "guard":
            known = ["guard", *(["policy"] if found.policy else []), *found.values]
            raise ConfigError(f"--judge {spec}: {key}={value} means nothing to the guard {found.name}; it knows {', '.join(known)}")
    return Guard(**{one.name: changes.get(one.name, getattr(found, one.name)) for one in fields(Guard)})


@cache
def guards() -> dict[str, Guard]:
    """The built-in profiles by name, the general ones last."""
    found = {path.stem: read_guard(path) for path in sorted(FOLDER.glob("*.yaml"))}
    return {name: found[name] for name in sorted(found, key=lambda name: (LAST.index(name) if name in LAST else -1, name))}


def read_guard(path: Path) -> Guard:
    """One profile from its file.

    Raises:
        ConfigError: not YAML, an unknown key, or a pattern that cannot be used.
    """
    import yaml

    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"guard {path}: cannot be read ({str(error).splitlines()[0]}); see sku_vllm/judges/guard.py") from error
    known = {one.name for one in fields(Guard)} - {"name"}
    if not isinstance(told, dict) or not told.keys() <= known:
        strange = sorted(set(told) - known)[0] if isinstance(told, dict) else type(told).__name__
        raise ConfigError(f"guard {path}: {strange!r} is no key of a profile; it may have {', '.join(sorted(known))}")
    values = {str(key).casefold(): str(value) for key, value in (told.pop("values", None) or {}).items()}
    verdict = str(told.get("verdict", "words"))
    if verdict not in GRAMMARS and "(?P<value>" not in verdict:
        raise ConfigError(f"guard {path}: verdict has to be {', '.join(GRAMMARS)}, or a regular expression with (?P<value>…)")
    if not set(values.values()) <= {"harmful", "harmless"} or (verdict not in GRAMMARS and not values):
        raise ConfigError(f"guard {path}: values has to say harmful or harmless of everything that (?P<value>…) may find")
    for key in ("models", "refusal", "category", *([] if verdict in GRAMMARS else ["verdict"])):
        try:
            re.compile(str(told.get(key, "")))
        except re.error as error:
            raise ConfigError(f"guard {path}: {key} is no regular expression ({error})") from error
    return Guard(path.stem, **{**told, "values": values, "choice": tuple(told.get("choice", ()))})


def _finds(pattern: str, model: str) -> bool:
    return re.search(pattern, model, re.IGNORECASE) is not None


def _read(path: Path, spec: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--judge {spec}: policy {path}: cannot be read ({error})") from error
