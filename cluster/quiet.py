"""Keeps libraries quiet: a user sees one progress line and what went wrong; --verbose undoes it."""

from __future__ import annotations

import logging
import os
import warnings

_NOISY = ("torchrec", "fbgemm_gpu", "torch", "ray", "absl", "tensorboard", "root")


def environment(verbose: bool) -> dict[str, str]:
    """Environment for this process and for workers, to be set before Ray starts."""
    common = {
        # Cluster-wide usage reports would leave the site.
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        # For as long, and then again, Ray waits for room for a group of the size that it chose.
        # It counts nodes every 20 s: with its 60 s, a run that lost one would wait for nothing.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "25",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if verbose:
        return common
    return {
        **common,
        "RAY_DEDUP_LOGS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_LOG_TO_DRIVER": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "GLOG_minloglevel": "3",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }


def apply(verbose: bool) -> None:
    """Quietens this process."""
    for key, value in environment(verbose).items():
        os.environ.setdefault(key, value)
    if verbose:
        return
    warnings.filterwarnings("ignore")
    for name in _NOISY:
        logging.getLogger(None if name == "root" else name).setLevel(logging.ERROR)
