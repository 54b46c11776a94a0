"""The stored form of a record: which Arrow columns hold what.

The columns of a record batch, without nulls:

- ``label``: float32, 0 or 1;
- ``dense``: fixed-size list of float32, transformed, in schema order (absent without any);
- ``ids``: fixed-size list of int64, one for each non-ragged sparse feature: the 63-bit hash, or
  the id itself for unhashed features with -1 for a missing one (absent without any);
- ``bag:NAME``: list of int64 for each ragged feature, and ``weights:NAME``: list of float32;
- ``user``: int64, a 63-bit hash of the user's key (absent without a column of users);
- ``record_key``: uint64 that decides the split (dropped when written).

Rows lie together (fixed-size lists, not one column a feature), because training reads random
rows: one record costs a few cache lines instead of one for each feature.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from dist_dp.datasets.schema import DataSchema

RECORD_KEY = "record_key"
USER = "user"


def stored_schema(schema: DataSchema) -> Any:
    """The Arrow schema of the stored form (without the record key)."""
    fields = [pa.field("label", pa.float32(), nullable=False)]
    if schema.dense:
        fields.append(pa.field("dense", pa.list_(pa.float32(), len(schema.dense)), nullable=False))
    single = sum(not f.ragged for f in schema.sparse)
    if single:
        fields.append(pa.field("ids", pa.list_(pa.int64(), single), nullable=False))
    for feature in schema.sparse:
        if feature.ragged:
            fields.append(pa.field(f"bag:{feature.name}", pa.list_(pa.int64()), nullable=False))
            if feature.weight_column is not None:
                name = f"weights:{feature.name}"
                fields.append(pa.field(name, pa.list_(pa.float32()), nullable=False))
    if schema.user is not None:
        fields.append(pa.field(USER, pa.int64(), nullable=False))
    return pa.schema(fields)
