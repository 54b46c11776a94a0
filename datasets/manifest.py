"""The manifest of a converted data set: what was read, how, and what lies on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dist_dp.datasets.schema import DataSchema
from dist_dp.errors import DataError
from dist_dp.file_names import why_no_name, why_not_inside
from dist_dp.limits import open_regular, read_json

# Stores with a column of users have version 2, so that older programs refuse them.
FORMAT_VERSIONS = (1, 2)
MANIFEST_NAME = "manifest.json"

_SAMPLE_EDGE = 1 << 20
_SAMPLE_BLOCK = 64 << 10
_SAMPLE_BLOCKS = 16


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class FileIdentity(_Frozen):
    """What tells a source file from another: name, size, time of change, sampled content."""

    name: str
    size: int
    mtime_ns: int
    sampled_sha256: str


class SplitInfo(_Frozen):
    """One split on disk.

    Attributes:
        file: Name of the Arrow file in the store's folder.
        rows: Number of records.
        bytes: Size of the file.
        sha256: Of the file, to notice damage.
        fingerprint: Sha256 of the stored values, in order, however they are laid out; but users,
            so that the same records are known for the same with and without them.
    """

    file: str
    rows: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: str
    fingerprint: str


class Manifest(_Frozen):
    """Everything about a converted data set but its records.

    Attributes:
        format_version: Version of the layout on disk.
        source_format: Format it was read as.
        source: Identity of every source file.
        data_schema: Schema (``schema`` in the file). Table sizes and pooling in it are
            defaults; see :meth:`dist_dp.datasets.store.ArrowStore.open`.
        split: Fractions by split name, or None for one split called ``all``.
        split_seed: Seed of the split.
        splits: The splits on disk.
        skipped_rows: Bad rows left out, by reason.
        fingerprint: Identifies the records: a sha256 over the splits' names and fingerprints.
    """

    format_version: int
    source_format: str
    source: tuple[FileIdentity, ...]
    data_schema: DataSchema = Field(alias="schema")
    split: dict[str, float] | None
    split_seed: int
    splits: dict[str, SplitInfo]
    skipped_rows: dict[str, int]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Records in all splits together."""
        return sum(info.rows for info in self.splits.values())

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def combined_fingerprint(splits: Mapping[str, SplitInfo]) -> str:
    """Sha256 over name, rows and fingerprint of each split, in the order given."""
    content = [[name, info.rows, info.fingerprint] for name, info in splits.items()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def identify_file(path: Path) -> FileIdentity:
    """Identity of a source file; reads at most 3 MiB of it (both ends and blocks between).

    Raises:
        OSError: It cannot be read.
        ValueError: It is a pipe or a device.
    """
    status = path.stat()
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as stream:
        digest.update(stream.read(_SAMPLE_EDGE))
        if status.st_size > 2 * _SAMPLE_EDGE:
            for i in range(1, _SAMPLE_BLOCKS + 1):
                stream.seek(status.st_size * i // (_SAMPLE_BLOCKS + 1))
                digest.update(stream.read(_SAMPLE_BLOCK))
        stream.seek(max(_SAMPLE_EDGE, status.st_size - _SAMPLE_EDGE))
        digest.update(stream.read(_SAMPLE_EDGE))
    return FileIdentity(
        name=path.name,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sampled_sha256=digest.hexdigest(),
    )


def check_schema_fits(manifest: Manifest, schema: DataSchema, where: Path) -> None:
    """Refuses a schema that reads the source differently from how it was converted.

    A schema without users may read a store with them.

    Raises:
        DataError: More than pooling and the sizes of hashed tables differ, or a table of
            unhashed ids has fewer rows than the ids were checked against.
    """
    stored_user = manifest.data_schema.user
    if schema.user is not None and schema.user != stored_user:
        held = f"those of column {stored_user!r}" if stored_user else "none"
        raise DataError(
            f"{where}: the users are to be those of column {schema.user!r}, but the data set was "
            f"converted with {held}; convert the source again"
        )
    if schema.with_user(stored_user).storage_hash() != manifest.data_schema.storage_hash():
        raise DataError(
            f"{where}: was converted with another schema; only pooling and num_embeddings may "
            "change afterwards: convert the source again"
        )
    stored = manifest.data_schema.table_rows()
    for feature in schema.sparse:
        rows = stored[feature.table_name]
        if not feature.hashed and feature.num_embeddings < rows:
            raise DataError(
                f"{where}: holds ids of {feature.name!r} up to {rows - 1}, which do not fit "
                f"num_embeddings={feature.num_embeddings}; use at least {rows}, or convert again"
            )


def load_manifest(folder: Path) -> Manifest:
    """Reads and checks the manifest of a store, and the sizes of its files.

    Raises:
        DataError: No store is there, it is of another version, or it is damaged.
    """
    path = folder / MANIFEST_NAME
    remedy = "convert the source again with overwrite=True"
    try:
        content: Any = read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: is not a converted data set (no {MANIFEST_NAME}); convert the source first"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise DataError(
            f"{path}: has format version {version!r}, this program reads {known}; {remedy}"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: is damaged at {place!r} ({first['msg']}); {remedy}") from error
    if manifest.fingerprint != combined_fingerprint(manifest.splits):
        raise DataError(f"{path}: is damaged (its fingerprint does not fit its splits); {remedy}")
    for info in manifest.splits.values():
        file = folder / info.file
        why = why_no_name(info.file) or why_not_inside(folder, info.file)
        if why is not None:
            raise DataError(f"{path}: names the file {info.file!r}, which {why}; {remedy}")
        size = file.stat().st_size if file.is_file() else None
        if size != info.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not {info.bytes}"
            raise DataError(f"{file}: {found}; the data set is damaged: {remedy}")
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compares the sha256 of every split file with the manifest.

    Raises:
        DataError: A file differs.
    """
    for info in manifest.splits.values():
        file = folder / info.file
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != info.sha256:
            raise DataError(
                f"{file}: is damaged (its sha256 is not the one in the manifest); convert the "
                "source again with overwrite=True"
            )
