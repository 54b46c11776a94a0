"""Keeping the plain functions out of compiled graphs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Make `torch.compile` call a function as it is, instead of tracing it.

    The key would become a constant of compiled code, kept in caches on disk. The same as
    `torch.compiler.disable`, but that takes a second to import, so it is left until something
    else has imported the compiler; before that, there is nothing that could trace.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def plain(*args: P.args, **options: P.kwargs) -> R:
        if not disabled:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **options)
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **options)

    plain._torchdynamo_disable = True  # type: ignore[attr-defined]
    return plain
