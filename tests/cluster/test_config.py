"""Configuration: YAML with overrides; what is wrong is named with its key and a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_dp.cluster.config import RunConfig, load_config, parse_config, parse_overrides
from dist_dp.errors import ConfigError
from dist_dp.schedules import ScheduleConfig
from tests.cluster.small import ROOT, SMALL, small, write_config

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_a_ledger_may_be_a_database_but_holds_no_password() -> None:
    url = "postgresql://ann@db/privacy?passfile=/secrets/pgpass"
    config = parse_config(changed("privacy", ledger=url))
    assert config.privacy.ledger == url
    for wrong in ("postgresql://ann:hunter2@db/privacy", "postgresql://db/x?password=hunter2"):
        with pytest.raises(ConfigError, match=r"privacy\.ledger.*PGPASSFILE") as caught:
            parse_config(changed("privacy", ledger=wrong))
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"privacy\.ledger.*give a path"):
        parse_config(changed("privacy", ledger="mysql://db/x"))


def changed(section: str, **values: Any) -> dict[str, Any]:
    return {**SMALL, section: {**SMALL.get(section, {}), **values}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_valid(path: Path) -> None:
    config = load_config(path, {"data.path": "x", "cluster.num_workers": 3})
    assert (config.data.path, config.cluster.num_workers) == ("x", 3)


def test_there_are_examples() -> None:
    assert "criteo_dlrm.yaml" in [p.name for p in EXAMPLES]


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    path = write_config(tmp_path, small(tmp_path, None))
    pairs = [
        "train.steps=7",
        "train.learning_rate.kind=cosine",
        "train.learning_rate.base=0.3",
        "train.learning_rate.total_steps=7",
        "model.sharding.C1=row_wise",
        "privacy.epsilon=null",
        "privacy.noise_multiplier=1.5",
        "privacy.delta=1e-6",  # a text to YAML 1.1
        "privacy.noise_multiplier_schedule.kind=cosine",
        "privacy.noise_multiplier_schedule.total_steps=7",
    ]
    config = load_config(path, parse_overrides(pairs))
    assert config.train.steps == 7
    assert config.train.learning_rate.kind == "cosine"
    assert config.model.sharding == {"C1": "row_wise"}
    assert config.privacy.epsilon is None
    assert config.privacy.noise_multiplier == 1.5
    assert config.privacy.delta == 1e-6
    falling = ScheduleConfig(kind="cosine", base=1.0, total_steps=7)
    assert config.privacy.noise_multiplier_schedule == falling
    # What the file says beside them stays.
    assert config.data.max_num_embeddings == 300


@pytest.mark.parametrize(
    ("given", "read"),
    [("auto", "auto"), ("null", None), ("2^-20", 2.0**-20), ("9.5367431640625e-07", 2.0**-20)],
)
def test_noise_grid(tmp_path: Path, given: str, read: float | str | None) -> None:
    path = write_config(tmp_path, small(tmp_path, None))
    config = load_config(path, parse_overrides([f"noise.grid={given}", "noise.rounds=12"]))
    assert config.noise.grid == read and config.noise.rounds == 12
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


def test_the_resolved_configuration_loads_again(tmp_path: Path) -> None:
    config = parse_config(
        changed("model", sharding={"C1": "row_wise", "C2": "auto"})
        | {"data": {"columns": {"label": "y", "sparse": [{"name": "a", "num_embeddings": 5}]}}}
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    # Every setting is in it, defaults too.
    assert set(yaml.safe_load(path.read_text())) == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (changed("privacy", epsilom=3), ["unknown key 'privacy.epsilom'", "max_grad_norm"]),
        ({**SMALL, "trian": {}}, ["unknown key 'trian'", "train"]),
        (
            changed("train", learning_rate={"base": 1.0, "warm": 3}),
            ["'train.learning_rate.warm'", "warmup_steps"],
        ),
        (changed("data", split={"train": 0.5, "dev": 0.5}), ["data.split.dev"]),
        (changed("train", steps="many"), ["'train.steps'", "integer", "'many'"]),
        (changed("train", steps=1.5), ["'train.steps'", "1.5"]),
        (changed("train", steps=True), ["train.steps", "must not be true or false"]),
        (changed("train", expected_batch_size=float("nan")), ["train.expected_batch_size"]),
        (changed("privacy", max_grad_norm=0), ["'privacy.max_grad_norm'", "greater than 0"]),
        (changed("privacy", clip_schedule={"kind": "cosine"}), ["clip_schedule", "total_steps"]),
        (
            changed("privacy", noise_multiplier_schedule={"kind": "step", "gamma": 0.5}),
            ["privacy.noise_multiplier_schedule", "step_size"],
        ),
        (
            changed("train", micro_batch_size=0),
            ["'train.micro_batch_size'", "greater"],
        ),
        (changed("privacy", epsilon=0), ["privacy.epsilon", "above 0"]),
        (changed("privacy", epsilon=-1), ["privacy.epsilon", "above 0"]),
        (changed("privacy", delta=1), ["privacy.delta", "between 0 and 1"]),
        (changed("privacy", mechanism="adagrad"), ["privacy.mechanism", "lazydp"]),
        (changed("privacy", mechanism="none"), ["privacy.mechanism", "remove epsilon"]),
        (changed("privacy", noise_multiplier=1), ["privacy.epsilon", "noise_multiplier", "remove"]),
        (changed("privacy", epsilon=None), ["privacy.epsilon: is missing"]),
        (changed("train", epochs=1), ["train.epochs", "steps", "remove"]),
        (changed("train", steps=None), ["train.epochs: is missing"]),
        ({k: v for k, v in SMALL.items() if k != "train"}, ["'train' is missing"]),
        (
            changed("train", table_optimizer="adagrad"),
            ["train.table_optimizer", "lazydp", "'adagrad'", "use sgd"],
        ),
        (
            {
                **changed("train", table_optimizer="adagrad", weight_decay=0.1),
                "privacy": {"mechanism": "none"},
            },
            ["train.weight_decay", "adagrad", "use sgd, or 0"],
        ),
        ({**SMALL, "noise": {"grid": 1e-6}}, ["noise.grid", "2^-20 = 9.53674e-07 and 2^-19"]),
        ({**SMALL, "noise": {"grid": "fine"}}, ["noise.grid", "power of two such as", "'fine'"]),
        ({**SMALL, "noise": {"grid": True}}, ["noise.grid", "power of two such as", "True"]),
        ({**SMALL, "noise": {"rounds": 8}}, ["'noise.rounds'", "20 or 12", "8"]),
        ({**SMALL, "noise": {"gird": "auto"}}, ["unknown key 'noise.gird'", "grid, rounds"]),
        (
            {**SMALL, "privacy": {"mechanism": "none"}, "noise": {"grid": "auto"}},
            ["noise.grid", "mechanism 'none'", "remove it"],
        ),
        (changed("train", momentum=1.0), ["'train.momentum'", "less than 1"]),
        (
            {
                **changed("train", table_optimizer="adagrad", momentum=0.9),
                "privacy": {"mechanism": "none"},
            },
            ["train.momentum", "adagrad", "use sgd, or 0"],
        ),
        (
            {**changed("train", momentum=0.9), "noise": {"grid": "auto"}},
            ["noise.grid", "train.momentum", "remove one"],
        ),
        (changed("train", weight_decay=3.0), ["train.weight_decay", "learning rate"]),
        (changed("model", dense_arch=[16, 4]), ["model.dense_arch", "embedding_dim 8"]),
        (changed("model", over_arch=[16, 2]), ["model.over_arch", "must be 1"]),
        (changed("model", dense_arch=[0, 8]), ["'model.dense_arch.0'", "equal to 1", "0"]),
        (changed("model", over_arch=[-3, 1]), ["'model.over_arch.0'", "equal to 1", "-3"]),
        (changed("model", name="custom"), ["model.factory", "custom"]),
        (changed("model", name="custom", factory="nocolon"), ["model.factory", "module:function"]),
        (changed("model", embedding_dim=7), ["model.embedding_dim", "multiple of 4"]),
        (changed("model", sharding="diagonal"), ["model.sharding", "row_wise"]),
        (changed("data", format="parquet"), ["data.columns", "declare"]),
        (changed("data", split={"train": 0.5, "test": 0.4}), ["data.split", "sum to 1"]),
        (changed("output", name="../elsewhere"), ["output.name"]),
        (changed("cluster", num_workers=0), ["cluster.num_workers", "greater than or equal to 1"]),
    ],
)
def test_errors_name_the_key_and_the_remedy(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_all_complaints_come_at_once() -> None:
    values = changed("privacy", epsilom=3) | {"train": {"steps": "many"}}
    with pytest.raises(ConfigError, match=r"epsilom.*; .*train\.steps"):
        parse_config(values)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml.*No such file"):
        load_config(tmp_path / "missing.yaml")
    path = tmp_path / "config.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="must hold keys and values"):
        load_config(path)
    path.write_text("train: {steps: [\n")
    with pytest.raises(ConfigError, match=r"no valid YAML.*line 2") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"train: \xff\xfe")
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(path)
    path.write_text("train: 5\n")
    with pytest.raises(ConfigError, match="'train' must hold keys and values"):
        load_config(path, {"train.steps": 5})


@pytest.mark.parametrize("pair", ["train.steps", "=5", "train.steps=[1"])
def test_overrides_that_are_none(pair: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides([pair])
