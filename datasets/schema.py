"""What a record holds: the label, the dense features and the sparse features with their tables.

Everything here is declared, nothing is measured. A vocabulary counted on private data reveals
which tokens occur in it (a rare one may belong to a single person), and a mean or a maximum
computed over private records is a statistic released without noise. So categorical tokens become
ids by a fixed hash (:mod:`dist_dp.datasets.hashing`), and dense features are rescaled by constants
that the user gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from dist_dp.errors import ConfigError

_Name = Annotated[str, Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SparseFeature(_Frozen):
    """One categorical feature: a single token a record, or (``ragged``) a bag of them.

    Attributes:
        name: Key of the feature in the batch's KeyedJaggedTensor.
        num_embeddings: Rows of its table.
        table: Table it looks up; its own name by default. Features may share one.
        pooling: How the embeddings of a bag are combined.
        hashed: True: tokens are hashed, and reduced modulo ``num_embeddings`` when a batch is
            made. False: the column holds integer ids, checked to lie in [0, num_embeddings).
        ragged: Whether a record holds a list.
        column: Column of the source it is read from; its own name by default.
        weight_column: Ragged only: column with one float weight for each id of the bag.
    """

    name: _Name
    num_embeddings: PositiveInt
    table: _Name | None = None
    pooling: Literal["sum", "mean"] = "sum"
    hashed: bool = True
    ragged: bool = False
    column: _Name | None = None
    weight_column: _Name | None = None

    @model_validator(mode="after")
    def _check(self) -> SparseFeature:
        if self.weight_column is not None and not self.ragged:
            raise ValueError(
                f"feature {self.name!r} has weight_column={self.weight_column!r} but holds a "
                "single id; set ragged: true or remove weight_column"
            )
        return self

    @property
    def table_name(self) -> str:
        """Name of the table, resolved."""
        return self.table or self.name

    @property
    def source_column(self) -> str:
        """Name of the source column, resolved."""
        return self.column or self.name


class DenseFeature(_Frozen):
    """One number a record, stored as ``(transform(x) - shift) / scale``.

    ``shift`` and ``scale`` are constants that must not be computed from the private records
    (a public description of the data, or a guess, will do).

    Attributes:
        name: Name of the feature; also the column unless ``column`` is given.
        transform: ``none``, or ``log1p`` for log(1 + max(x, 0)).
        shift: Subtracted after the transform.
        scale: Divided by, last.
        missing: Value of x where the source has none; None makes a missing value an error.
        column: Column of the source it is read from; its own name by default.
    """

    name: _Name
    transform: Literal["none", "log1p"] = "none"
    shift: float = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0
    missing: float | None = None
    column: _Name | None = None

    @property
    def source_column(self) -> str:
        """Name of the source column, resolved."""
        return self.column or self.name


class DataSchema(_Frozen):
    """The label and the features of a data set, in the order in which batches hold them.

    Attributes:
        label: Source column of the label.
        label_threshold: When given, the label is 1 where the column is at least this value
            (for instance a rating of 4 or more); otherwise the column must hold exactly 0 or 1.
        dense: Dense features, in order.
        sparse: Sparse features, in order; at least one.
        user: Source column with the key of the person whose the record is, for a guarantee for
            users; None if records are what is protected. It is no feature.
    """

    label: _Name
    label_threshold: float | None = None
    dense: tuple[DenseFeature, ...] = ()
    sparse: Annotated[tuple[SparseFeature, ...], Field(min_length=1)]
    user: _Name | None = None

    @model_validator(mode="after")
    def _check(self) -> DataSchema:
        names = [f.name for f in self.dense] + [f.name for f in self.sparse]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two features are called {name!r}; rename one of them")
        first: dict[str, SparseFeature] = {}
        for feature in self.sparse:
            other = first.setdefault(feature.table_name, feature)
            for setting in ("num_embeddings", "hashed"):
                if getattr(feature, setting) != getattr(other, setting):
                    raise ValueError(
                        f"features {other.name!r} and {feature.name!r} share table "
                        f"{feature.table_name!r} but differ in {setting} "
                        f"({getattr(other, setting)} and {getattr(feature, setting)}); "
                        "make them equal"
                    )
        return self

    def table_rows(self) -> dict[str, int]:
        """Rows of each table, by table name, in the order of first use."""
        return {f.table_name: f.num_embeddings for f in self.sparse}

    def with_num_embeddings(
        self, overrides: Mapping[str, int] | None = None, maximum: int | None = None
    ) -> DataSchema:
        """A copy with other table sizes; hashed data need not be converted again for it.

        Args:
            overrides: New number of rows by table name.
            maximum: Cap on the rows of every hashed table that ``overrides`` does not name.
                Tables of unhashed ids keep their size: every id needs its row.

        Raises:
            ConfigError: ``overrides`` names an unknown table, or a size is not positive.
        """
        overrides = dict(overrides or {})
        unknown = sorted(set(overrides) - set(self.table_rows()))
        if unknown:
            raise ConfigError(
                f"no table is called {unknown[0]!r}; the tables are {', '.join(self.table_rows())}"
            )
        for what, size in [*overrides.items(), ("maximum", maximum)]:
            if size is not None and size < 1:
                raise ConfigError(f"{what} asks for {size} rows; a table needs at least 1")

        def resized(feature: SparseFeature) -> SparseFeature:
            size = overrides.get(feature.table_name, feature.num_embeddings)
            if maximum is not None and feature.hashed and feature.table_name not in overrides:
                size = min(size, maximum)
            return feature.model_copy(update={"num_embeddings": size})

        return self.model_copy(update={"sparse": tuple(resized(f) for f in self.sparse)})

    def storage_hash(self) -> str:
        """Hex sha256 of all settings that shape the stored form.

        Pooling and table sizes are left out: they take effect only when a batch is made.
        """
        settings = self.model_dump(mode="json")
        if self.user is None:
            # As it was before schemas named a user: older stores are still found.
            del settings["user"]
        for feature in settings["sparse"]:
            feature["table"] = feature["table"] or feature["name"]
            del feature["num_embeddings"], feature["pooling"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def with_user(self, user: str | None) -> DataSchema:
        """A copy with another column of users, or with none."""
        return self.model_copy(update={"user": user})

    def source_columns(self) -> list[str]:
        """Every source column that is read, each once, the label first, users last."""
        names = [self.label, *(f.source_column for f in self.dense)]
        names += [f.source_column for f in self.sparse]
        names += [f.weight_column for f in self.sparse if f.weight_column is not None]
        names += [] if self.user is None else [self.user]
        return list(dict.fromkeys(names))
