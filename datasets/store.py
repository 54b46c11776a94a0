"""A converted data set on disk: conversion, opening, and its splits.

The folder holds ``manifest.json`` and one memory-mapped Arrow IPC file for each split. Sizes are
checked whenever it is opened; contents are compared with their sha256 on request.
"""

from __future__ import annotations

from pathlib import Path

from dist_dp.datasets.click_dataset import ClickDataset
from dist_dp.datasets.convert import convert, write_store
from dist_dp.datasets.manifest import (
    Manifest,
    check_schema_fits,
    load_manifest,
    verify_files,
)
from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import DataError

__all__ = ["ArrowStore", "ClickDataset", "Manifest", "convert", "write_store"]


class ArrowStore:
    """A converted data set, open for reading.

    Attributes:
        path: Its folder.
        manifest: What the folder says about itself.
        schema: Features, with the table sizes that batches are made for.
    """

    def __init__(self, path: Path, manifest: Manifest, schema: DataSchema) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.manifest = manifest
        self.schema = schema

    @classmethod
    def open(
        cls, path: str | Path, verify: bool = False, schema: DataSchema | None = None
    ) -> ArrowStore:
        """Opens a store.

        Args:
            path: Folder made by :func:`convert`.
            verify: Also compare every file with its sha256 (reads all of it).
            schema: Schema to use in place of the stored one: same source columns (but it need not
                name that of the users), other table sizes or pooling. Pass
                ``convert(...).data_schema`` to be sure to get the sizes that were asked for, when
                the store may be older.

        Raises:
            DataError: No store is there, it is damaged, or ``schema`` does not fit it.
        """
        path = Path(path)
        manifest = load_manifest(path)
        if schema is not None:
            check_schema_fits(manifest, schema, path)
            schema = schema.with_user(manifest.data_schema.user)
        if verify:
            verify_files(path, manifest)
        return cls(path, manifest, schema or manifest.data_schema)

    @property
    def fingerprint(self) -> str:
        """Identifies the records of all splits together."""
        return self.manifest.fingerprint

    @property
    def num_bytes(self) -> int:
        """Size of all split files, in bytes."""
        return sum(info.bytes for info in self.manifest.splits.values())

    def split_names(self) -> list[str]:
        """Names of the splits."""
        return list(self.manifest.splits)

    def split(self, name: str) -> ClickDataset:
        """Opens one split.

        Raises:
            DataError: There is no such split, or its file is damaged.
        """
        info = self.manifest.splits.get(name)
        if info is None:
            raise DataError(
                f"{self.path}: has no split {name!r}; it has {', '.join(self.split_names())}"
            )
        return ClickDataset(self.path / info.file, name, self.schema, info.rows, info.fingerprint)
