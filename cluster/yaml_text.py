"""YAML as plain values: no tags that build objects, and no text that is far more than it seems."""

from __future__ import annotations

from typing import Any

import yaml

from dist_dp.limits import MAX_CONFIG_VALUES


def read_yaml(text: str | bytes) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: It is no YAML, asks for an object, is nested too deeply, or its aliases stand
            for too many values.
    """
    try:
        value = yaml.safe_load(text)
        # A line of aliases to the line before, forty times, is a billion values.
        if _size(value, {}, set()) > MAX_CONFIG_VALUES:
            raise ValueError(f"its aliases stand for more than {MAX_CONFIG_VALUES:,} values")
    except yaml.YAMLError as error:
        raise ValueError(f"it is no valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _size(value: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values there are, aliases followed; each is counted once and then known."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in above:
        raise ValueError("it holds itself by an alias")
    if id(value) not in known:
        above.add(id(value))
        held = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known, above) for each in held)
        above.remove(id(value))
    return known[id(value)]
