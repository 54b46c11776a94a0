"""Training checkpoints: everything a run needs to go on, and nothing that may be published.

A checkpoint is a folder (mode 0700)::

    checkpoint.json            what it is; marked private
    secret                     the run's key (mode 0600)
    dense.safetensors          dense layers and their optimizer's state
    schedule.safetensors       the noise schedule
    shards-RANK.safetensors    weights and history of a rank's table shards, *not settled*

Rows in it lack the noise that still waits for them, so the loader for serving refuses it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_dp.distributed import all_reduce_max, all_together, rank, world_size
from dist_dp.errors import CheckpointError

if TYPE_CHECKING:
    from dist_dp.engine import PrivacyEngine
    from dist_dp.private_model import PrivateModel

FORMAT = "dist-dp-checkpoint"
FORMAT_VERSION = 1


def save_checkpoint(engine: PrivacyEngine, folder: Path) -> Path:
    """Writes a checkpoint, whole or not at all, in place of an older one; every rank calls it.

    Args:
        engine: The engine, between two steps.
        folder: Where it goes, on storage that all ranks share.

    Returns:
        The folder.

    Raises:
        CheckpointError: It could not be written; the older one is kept.

    Guarantee:
        None: a checkpoint is as secret as the records. It holds unsettled rows and the key from
        which all noise of the run can be computed.
    """
    parts = engine.parts
    if any(not cut.linear for cut in parts.cuts):
        raise CheckpointError(
            "checkpoints support the table optimizer sgd; set train.checkpoint_every to 0"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")

    def prepare() -> None:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, mode=0o700)

    def write() -> None:
        _save(partial / f"shards-{rank():05d}.safetensors", _shard_tensors(parts))
        if rank() == 0:
            _save(partial / "dense.safetensors", _dense_tensors(parts))
            state = parts.mechanism.schedule.state_dict()
            tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
            _save(partial / "schedule.safetensors", tensors)
            _write_secret(partial / "secret", engine.secret)

    layouts = _gather_layouts(parts)
    step = parts.mechanism.schedule.step
    behind = torch.tensor([float(any(not parts.mechanism.is_settled(s) for s in parts.shards))])
    settled = not bool(all_reduce_max(behind.to(parts.device)).item())

    def publish() -> None:
        if rank() != 0:
            return
        info = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "note": "PRIVATE: not settled, holds the run's secret. Never publish or serve it.",
            "step": step,
            "settled": settled,
            "settings": engine.settings,
            "run_id": engine.run_id,
            "dataset": engine.dataset,
            "fixed_secret": engine.secret_is_given,
            "plan": parts.plan.model_dump(),
            "layout": layouts,
        }
        (partial / "checkpoint.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    for action in (prepare, write, publish):
        all_together(action, CheckpointError, "write the checkpoint")
    return folder


def read_checkpoint_info(folder: Path) -> dict[str, Any]:
    """The description of a checkpoint.

    Raises:
        CheckpointError: There is none, or of another version.
    """
    # A crash between the two renames of save_checkpoint leaves the older one under this name.
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        old.rename(folder)
    path = folder / "checkpoint.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{folder}' holds no checkpoint ({error}); a run saves them with "
            "train.checkpoint_every"
        ) from None
    if info.get("format") != FORMAT or info.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"'{path}' is of another format or version than this package reads")
    return info


def read_secret(folder: Path) -> bytes:
    """The secret of the run that a checkpoint belongs to.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        secret = (folder / "secret").read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the secret in '{folder}': {error.strerror}") from None
    if len(secret) != 32:
        raise CheckpointError(f"the secret in '{folder}' is damaged")
    return secret


def load_checkpoint(engine: PrivacyEngine, folder: Path) -> tuple[int, bool]:
    """Loads a checkpoint into an engine that was just made private; every rank calls it.

    Args:
        engine: Same model, plan, sharding and number of workers as the one saved.
        folder: The checkpoint.

    Returns:
        The last finished step, and whether every row was settled.

    Raises:
        CheckpointError: It is damaged, or of another run, plan, sharding or number of workers.
    """
    from safetensors.torch import load_file

    parts = engine.parts
    info = read_checkpoint_info(folder)
    layouts = _gather_layouts(parts)
    for what, saved, now in (
        ("number of workers or sharding", info["layout"], layouts),
        ("privacy plan", info["plan"], parts.plan.model_dump()),
        ("run", info["run_id"], engine.run_id),
        ("training settings", info["settings"], engine.settings),
    ):
        if saved != json.loads(json.dumps(now)):
            raise CheckpointError(
                f"the checkpoint '{folder}' was saved with another {what}; resume with the same "
                "configuration"
            )

    def read() -> None:
        schedule = load_file(folder / "schedule.safetensors")
        parts.mechanism.schedule.load_state_dict({"step": info["step"], **schedule})
        saved = load_file(folder / f"shards-{rank():05d}.safetensors")
        for name, tensor in _shard_tensors(parts).items():
            tensor.copy_(saved[name])
        _load_dense(parts, load_file(folder / "dense.safetensors"))

    with torch.no_grad():
        all_together(read, CheckpointError, f"read the checkpoint '{folder}'")
    return int(info["step"]), bool(info["settled"])


def _gather_layouts(parts: PrivateModel) -> list[Any]:
    mine = [
        [s.table, s.row_offset, s.column_offset, list(s.weight.shape), s.kind] for s in parts.shards
    ]
    layouts: list[Any] = [mine] * world_size()
    if world_size() > 1:
        torch.distributed.all_gather_object(layouts, mine)
    return layouts


def _shard_tensors(parts: PrivateModel) -> dict[str, Tensor]:
    """Live tensors of this rank's shards, by name."""
    tensors: dict[str, Tensor] = {}
    for number, shard in enumerate(parts.shards):
        tensors[f"{number}.weight"] = shard.weight
        tensors[f"{number}.last_step"] = shard.last_step
    return tensors


def _dense_tensors(parts: PrivateModel) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"parameter.{n}": p for n, p in parts.recorder.parameters.items()}
    if parts.optimizer.dense is not None:
        for index, state in parts.optimizer.dense.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return tensors


def _load_dense(parts: PrivateModel, saved: dict[str, Tensor]) -> None:
    for name, parameter in parts.recorder.parameters.items():
        parameter.copy_(saved[f"parameter.{name}"])
    dense = parts.optimizer.dense
    if dense is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            index, _, name = rest.partition(".")
            state.setdefault(int(index), {})[name] = value
    dense.load_state_dict({"state": state, "param_groups": dense.state_dict()["param_groups"]})


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)


def _write_secret(path: Path, secret: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
