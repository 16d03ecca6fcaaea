"""What an attack measured, whatever its kind."""

from typing import Any


def attack_points(attack: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(what was done, forget object) for every measurement of an attack, in order."""
    found = []
    for key in ("before", "after"):
        if isinstance(attack.get(key), dict) and "forget" in attack[key]:
            found.append((key, attack[key]["forget"]))
    for point in attack.get("curve") or []:
        name = next((f"{point[key]} {key}" for key in ("steps", "step") if key in point), None) or str(point.get("name") or point.get("attack") or "")
        found.append((name, point.get("forget") or {}))
    if isinstance(attack.get("forget"), dict):
        found.append(("the attack", attack["forget"]))
    return found


def worst_recovery(attack: dict[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """(what was done, forget set and mode, shares) where the attack brought back the most harm."""
    found = [
        (done, f"{name}, {mode}", shares) for done, forget in attack_points(attack) for name, modes in forget.items() for mode, shares in modes.items()
        if shares.get("harmful") is not None
    ]
    return max(found, key=lambda one: one[2]["harmful"]) if found else None
