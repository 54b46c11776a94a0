from __future__ import annotations

import pytest
from pydantic import ValidationError

from dist_dp.datasets.schema import DataSchema, DenseFeature, SparseFeature
from dist_dp.errors import ConfigError


def make(**changes: object) -> DataSchema:
    settings: dict[str, object] = {
        "label": "y",
        "dense": [{"name": "d"}],
        "sparse": [
            {"name": "a", "num_embeddings": 100, "table": "shared"},
            {"name": "b", "num_embeddings": 100, "table": "shared"},
            {"name": "c", "num_embeddings": 7, "hashed": False},
        ],
    }
    return DataSchema.model_validate(settings | changes)


def test_table_rows_and_columns() -> None:
    schema = make()
    assert schema.table_rows() == {"shared": 100, "c": 7}
    assert schema.source_columns() == ["y", "d", "a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unknown": 1}, "unknown"),
        ({"sparse": []}, "at least 1"),
        ({"sparse": [{"name": "d", "num_embeddings": 1}]}, "two features"),
        ({"sparse": [{"name": "a", "num_embeddings": 0}]}, "greater than 0"),
        ({"sparse": [{"name": "a", "num_embeddings": 1, "weight_column": "w"}]}, "ragged"),
        (
            {
                "sparse": [
                    {"name": "a", "num_embeddings": 5, "table": "t"},
                    {"name": "b", "num_embeddings": 6, "table": "t"},
                ]
            },
            "differ in num_embeddings",
        ),
        (
            {
                "sparse": [
                    {"name": "a", "num_embeddings": 5, "table": "t"},
                    {"name": "b", "num_embeddings": 5, "table": "t", "hashed": False},
                ]
            },
            "differ in hashed",
        ),
        ({"dense": [{"name": "d", "scale": 0}]}, "greater than 0"),
        ({"dense": [{"name": "d", "transform": "standard"}]}, "log1p"),
        ({"dense": [{"name": "d", "shift": float("nan")}]}, "finite"),
    ],
)
def test_impossible_schemas_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make(**changes)


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        make().label = "other"  # type: ignore[misc]


def test_with_num_embeddings() -> None:
    schema = make().with_num_embeddings({"shared": 500})
    assert schema.table_rows() == {"shared": 500, "c": 7}
    # A cap leaves unhashed ids and explicit sizes alone.
    assert make().with_num_embeddings({}, maximum=5).table_rows() == {"shared": 5, "c": 7}
    capped = make().with_num_embeddings({"shared": 50, "c": 9}, maximum=5)
    assert capped.table_rows() == {"shared": 50, "c": 9}
    for overrides, maximum in (({"a": 5}, None), ({"shared": 0}, None), ({}, 0)):
        with pytest.raises(ConfigError):
            make().with_num_embeddings(overrides, maximum)


def test_storage_hash_ignores_what_acts_in_the_batch_only() -> None:
    schema = make()
    same = schema.with_num_embeddings({"shared": 9, "c": 70})
    assert same.storage_hash() == schema.storage_hash()
    mean = SparseFeature(name="a", num_embeddings=5, pooling="mean")
    assert (
        DataSchema(label="y", sparse=[mean]).storage_hash()
        == DataSchema(label="y", sparse=[SparseFeature(name="a", num_embeddings=8)]).storage_hash()
    )
    for other in (
        make(label="z"),
        make(label_threshold=1),
        make(dense=[DenseFeature(name="d", transform="log1p")]),
        make(sparse=[SparseFeature(name="a", num_embeddings=100)]),
    ):
        assert other.storage_hash() != schema.storage_hash()


def test_the_package_gives_every_name_it_lists() -> None:
    import types

    import dist_dp.datasets

    for name in dist_dp.datasets.__all__:
        # A submodule of the same name would hide the function.
        assert not isinstance(getattr(dist_dp.datasets, name), types.ModuleType), name
