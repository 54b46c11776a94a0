"""The few collectives this package uses, in one place; one process needs none of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_dp.errors import ConfigError, DistDpError

T = TypeVar("T")


def ensure_process_group() -> None:
    """Joins a process group of one when none exists, so that sharding works in a plain script.

    The store lives in this process: no port is opened.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Processes on this host: LOCAL_WORLD_SIZE, as torchrun and Ray Train set it; else all.

    Raises:
        ConfigError: The variable is no number of processes.
    """
    given = os.environ.get("LOCAL_WORLD_SIZE")
    if given is None:
        return world_size()
    if not given.isdecimal() or not 1 <= int(given) <= world_size():
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is '{given}'; it must be the number of processes on this host, "
            f"from 1 to {world_size()}: unset it, or start the workers with torchrun"
        )
    return int(given)


def agree_on_hosts() -> None:
    """Makes sure that hosts have equally many ranks, consecutive ones; every rank calls it.

    TorchRec's node-wise sharding assumes both, and assumes 8 ranks a host where LOCAL_WORLD_SIZE
    is not set: so it is set here.

    Raises:
        ConfigError: On every rank alike, if it is otherwise.
    """
    size = local_world_size()
    place = int(os.environ.get("LOCAL_RANK", rank() % size))
    found = all_gather_cat(torch.tensor([size, place])).view(-1, 2).tolist()
    if found != [[size, number % size] for number in range(world_size())] or world_size() % size:
        raise ConfigError(
            "table_row_wise and grid need the same number of workers on every host, with "
            f"consecutive ranks, but (workers on the host, place among them) is {found} by rank; "
            "change the number of workers, or choose row_wise, column_wise or table_wise"
        )
    os.environ["LOCAL_WORLD_SIZE"] = str(size)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sums a tensor over ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_max(value: Tensor) -> Tensor:
    """Maximum over ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def broadcast_object(value: T, source: int = 0) -> T:
    """Gives every rank the source's object (simple types, small)."""
    if world_size() == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def all_gather_cat(value: Tensor) -> Tensor:
    """Concatenates 1-D tensors of any length over ranks, in rank order."""
    if world_size() == 1:
        return value
    size = torch.tensor([value.numel()], device=value.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    counts = [int(s) for s in sizes]
    padded = value.new_zeros(max(1, max(counts)))
    padded[: value.numel()] = value
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([p[:c] for p, c in zip(parts, counts, strict=True)])


def all_gather_objects(value: T) -> list[T]:
    """Every rank's object (simple types, small), in rank order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        dist.barrier()


def all_together(action: Callable[[], None], kind: type[DistDpError], what: str) -> None:
    """Runs an action on every rank; if it fails on one it fails on all, so that none waits.

    Args:
        action: Without collectives inside.
        kind: Error to raise for any failure that is not one of this package's own.
        what: What the action does, for the message.

    Raises:
        DistDpError: The action's own, or ``kind`` (a full disk is named as such).
    """
    failure: DistDpError | None = None
    try:
        action()
    except DistDpError as error:
        failure = error
    except Exception as error:
        failure = kind(f"could not {what}: {error}. Nothing was kept of it.")
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            failure = kind(
                f"could not {what}: the disk is full. Nothing was kept of it; free some space, or "
                "choose another place."
            )
        failure.__cause__ = error
    messages: list[str | None] = [None] * world_size()
    if world_size() > 1:
        dist.all_gather_object(messages, str(failure) if failure else None)
    if failure is not None:
        raise failure
    elsewhere = next((m for m in messages if m), None)
    if elsewhere:
        raise kind(elsewhere)
