"""The table of measurements by step, and what TensorBoard gets of it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_dp.cluster.metrics_log import (
    METRICS_FILE,
    STEP_COLUMNS,
    TENSORBOARD_FOLDER,
    MetricsLog,
    read_metrics,
    tensorboard_tag,
)
from dist_dp.errors import DataError


def _row(step: int, **values: float) -> dict[str, float | int]:
    return {"step": step, "loss": 1.0 / step, **values}


def test_rows_come_back_with_gaps_and_infinities(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(_row(1, epsilon=math.inf, loss=math.nan, batch_size=2048))
        log.write(_row(2, valid_auc=0.789123, learning_rate=1e-7))
    columns = read_metrics(tmp_path)
    assert tuple(columns) == STEP_COLUMNS
    assert all(values.dtype == np.float64 and len(values) == 2 for values in columns.values())
    assert columns["step"].tolist() == [1, 2]
    assert columns["epsilon"][0] == math.inf
    assert np.isnan(columns["epsilon"][1])
    assert np.isnan(columns["loss"][0])
    assert columns["loss"][1] == 0.5
    assert columns["batch_size"][0] == 2048
    np.testing.assert_allclose(columns["valid_auc"][1], 0.789123)
    np.testing.assert_allclose(columns["learning_rate"][1], 1e-7)


def test_header_is_the_fixed_columns(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False):
        pass
    assert (tmp_path / METRICS_FILE).read_text() == ",".join(STEP_COLUMNS) + "\n"
    assert all(len(values) == 0 for values in read_metrics(tmp_path).values())


def test_a_killed_process_keeps_its_rows(tmp_path: Path) -> None:
    """Killed in the middle of a run, without a chance to close anything."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from dist_dp.cluster.metrics_log import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), tensorboard=False)\n"
        "for step in range(1, 51): log.write({'step': step, 'loss': 0.5})\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read_metrics(tmp_path)["step"].tolist() == list(range(1, 51))


@pytest.mark.parametrize("tail", ["3,0.2", "3,0.25,,,", "3"])
def test_half_a_row_is_left_out_and_mended(tmp_path: Path, tail: str) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(_row(1))
        log.write(_row(2))
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write(tail)
    assert read_metrics(tmp_path)["step"].tolist() == [1, 2]
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(_row(3))
    columns = read_metrics(tmp_path)
    assert columns["step"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(columns["loss"][2], 1 / 3, rtol=1e-6)


def test_half_a_header_is_mended(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text("step,lo")
    assert len(read_metrics(tmp_path)["step"]) == 0
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(_row(1))
    assert read_metrics(tmp_path)["step"].tolist() == [1]


def test_mending_keeps_every_row_of_a_long_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 2001):
            log.write(_row(step))
    before = (tmp_path / METRICS_FILE).read_bytes()
    with MetricsLog(tmp_path, tensorboard=False):
        pass
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_replayed_step_counts_once_and_as_the_later(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in (1, 2, 3, 4):
            log.write({"step": step, "loss": 1.0})
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in (3, 4, 5):
            log.write({"step": step, "loss": 2.0})
    columns = read_metrics(tmp_path)
    assert columns["step"].tolist() == [1, 2, 3, 4, 5]
    assert columns["loss"].tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_errors_name_the_thing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.csv"):
        read_metrics(tmp_path / "nowhere")
    log = MetricsLog(tmp_path, tensorboard=False)
    with pytest.raises(DataError, match="clip_frac"):
        log.write({"step": 1, "clip_frac": 0.5})
    with pytest.raises(DataError, match="'step'"):
        log.write({"loss": 0.5})
    log.close()
    log.close()
    with pytest.raises(DataError, match="closed"):
        log.write(_row(1))
    (tmp_path / METRICS_FILE).write_text("step,loss\n1,abc\n")
    with pytest.raises(DataError, match="table of numbers"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match="other columns"):
        MetricsLog(tmp_path, tensorboard=False)
    (tmp_path / METRICS_FILE).write_text("loss,other\n1,2\n")
    with pytest.raises(DataError, match="no column 'step'"):
        read_metrics(tmp_path)


def test_files_of_other_versions_are_read(tmp_path: Path) -> None:
    """A column more or less does not make an old run unreadable."""
    (tmp_path / METRICS_FILE).write_text("step,loss,retired\n1,0.5,7\n")
    columns = read_metrics(tmp_path)
    assert tuple(columns) == STEP_COLUMNS
    assert columns["loss"].tolist() == [0.5]
    assert np.isnan(columns["epsilon"]).all()


def test_tensorboard_has_the_scalars_by_group(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 10_000, 10_001, 123_400, 123_450):
            log.write({"step": step, "loss": float(step), "epsilon": 1.5, "clip_ms": 2.0})
        log.write({"step": 123_451, "valid_auc": 0.75})
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "privacy/epsilon",
        "phases/clip_ms",
        "valid/auc",
    }
    # Thinned out past 10,000 and again past 100,000 steps; an evaluation is never left out.
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 10_000, 123_400]
    assert [e.value for e in events.Scalars("train/loss")] == [1.0, 2.0, 10_000.0, 123_400.0]
    assert [e.step for e in events.Scalars("valid/auc")] == [123_451]
    assert len(read_metrics(tmp_path)["step"]) == 7


def test_tags_are_distinct() -> None:
    tags = [tensorboard_tag(name) for name in STEP_COLUMNS if name != "step"]
    assert len(set(tags)) == len(tags)
    assert tensorboard_tag("clip_fraction") == "privacy/clip_fraction"
