"""Settings that name paths stay in their folder; files beside a run are measured; YAML is plain."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from dist_dp.cluster.config import load_config, parse_config
from dist_dp.cluster.metrics_log import METRICS_FILE, read_metrics
from dist_dp.cluster.models import embedding_bags
from dist_dp.cluster.report import write_report
from dist_dp.cluster.run_folder import create_run_folder, read_summary, write_summary
from dist_dp.cluster.yaml_text import read_yaml
from dist_dp.datasets.schema import DataSchema
from dist_dp.distributed import ensure_process_group
from dist_dp.errors import ConfigError, DataError, ModelError
from dist_dp.shard_model import shard_model
from dist_dp.sharding import TableOptimizer
from tests.cluster.small import assert_one_line_error, run, runs_left, small, write_config
from tests.dist_dp.hostile import DEEP, planted_pickle, sparse

NAMES = ["../../x", "/tmp/x", "a/b", "..", ".", "a\0b", ".hidden", "x" * 101, "", "a\n"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_s_name_is_no_path(tmp_path: Path, clicks: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"output\.name"):
        parse_config(small(tmp_path, clicks, output={"name": name}))


def test_the_command_line_says_so(tmp_path: Path, clicks: Path) -> None:
    path = write_config(tmp_path, small(tmp_path, clicks))
    assert_one_line_error(run("train", "-c", path, "--name", "../../x"), "output.name", "../../x")
    assert runs_left(tmp_path) == []


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "a\x1b[2J", "x" * 201])
def test_a_data_set_s_name_is_a_line(tmp_path: Path, clicks: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.name"):
        parse_config(small(tmp_path, clicks, data={"name": name}))


@pytest.mark.parametrize("dataset", ["../../x", "/etc/x", "..", "x" * 200, "clicks of 2026", "…"])
def test_a_data_set_s_name_makes_no_path(tmp_path: Path, dataset: str) -> None:
    folder = create_run_folder(tmp_path / "runs", None, dataset)
    assert folder.parent == (tmp_path / "runs").resolve()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_link_is_not_followed_to_another_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists"):
        create_run_folder(tmp_path / "runs", "mine", "clicks")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["x/../../../../evil", "/etc/x", "a\0b", "user.id"])
def test_a_table_s_name_makes_no_path(name: str) -> None:
    schema = DataSchema.model_validate(
        {"label": "y", "sparse": [{"name": "a", "table": name, "num_embeddings": 9}]}
    )
    with pytest.raises(ConfigError, match="can name neither a module nor a folder"):
        embedding_bags(schema, 8)


def test_nor_does_that_of_a_model_of_one_s_own() -> None:
    configs = [
        EmbeddingBagConfig(name="a\nb", embedding_dim=4, num_embeddings=9, feature_names=["a"])
    ]
    module = torch.nn.ModuleDict({"tables": EmbeddingBagCollection(tables=configs)})
    ensure_process_group()
    with pytest.raises(ModelError, match=r"cannot name a folder.*control character.*another name"):
        shard_model(
            module,
            "table_wise",
            optimizer=TableOptimizer("sgd"),
            secret=bytes(32),
            batch_size=8,
        )


def test_files_of_a_run_are_measured(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    planted = planted_pickle(touched)
    for content in (planted, DEEP):
        (tmp_path / "summary.json").write_bytes(content)
        for read in (read_summary, write_report):
            with pytest.raises(DataError, match=r"summary\.json"):
                read(tmp_path)
    sparse(tmp_path / "summary.json", 10 << 30)
    with pytest.raises(DataError, match="10,737,418,240 bytes"):
        read_summary(tmp_path)
    (tmp_path / METRICS_FILE).write_bytes(planted)
    with pytest.raises(DataError):
        read_metrics(tmp_path)
    sparse(tmp_path / METRICS_FILE, 10 << 30)
    with pytest.raises(DataError, match="10,737,418,240 bytes"):
        read_metrics(tmp_path)
    assert not touched.exists()


def test_what_is_written_is_the_owner_s(tmp_path: Path) -> None:
    for _ in range(2):
        partial = tmp_path / ".summary.json.partial"
        partial.touch(mode=0o666)
        write_summary(tmp_path, {"a": 1})
        assert stat.S_IMODE((tmp_path / "summary.json").stat().st_mode) == 0o600


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases stand for more than"),
        ("a: &a [*a]", "holds itself"),
        (DEEP.decode(), "nested too deeply"),
        ("a: !!python/object/apply:os.system [touch touched]", "no valid YAML"),
        ("a: !!python/name:os.system", "no valid YAML"),
    ],
)
def test_a_configuration_is_plain_values(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_configuration_has_a_size(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(planted_pickle(tmp_path / "touched"))
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(path)
    sparse(path, 10 << 30)
    with pytest.raises(ConfigError, match="10,737,418,240 bytes"):
        load_config(path)
    anchors: Any = read_yaml("a: &x {b: 1}\nc: *x")
    assert anchors == {"a": {"b": 1}, "c": {"b": 1}}
    assert not (tmp_path / "touched").exists()
