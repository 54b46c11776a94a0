"""What a release says about itself, checked before anything in it is believed.

A release is what is passed on, so ``release.json`` may come from anybody: names in it stay inside
the folder, and it cannot claim tables that its files are too small to hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dist_dp.errors import ReleaseError
from dist_dp.file_names import why_not_inside
from dist_dp.limits import read_json
from dist_dp.release import FORMAT, FORMAT_VERSION
from dist_dp.release_files import MANIFEST

DENSE_FILE = "dense.safetensors"
_VALUE_BYTES = 4
"""Tables are released as float32."""

_Size = Annotated[int, Field(ge=0, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Table(_Part):
    rows: Annotated[int, Field(ge=1, strict=True)]
    dim: Annotated[int, Field(ge=1, strict=True)]
    collection: str
    name: str
    pooled: bool


class _File(_Part):
    bytes: _Size
    sha256: str


class _Manifest(_Part):
    settled_to_step: _Size
    tables: dict[str, _Table]
    files: dict[str, _File]
    model: dict[str, Any] | None = None
    privacy: dict[str, Any]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of ``release.json``.

    Args:
        folder: The release.

    Raises:
        ReleaseError: It is no release of this version, is damaged, names a file elsewhere or one
            that is not there in its size, or claims more than its files hold.
    """
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ReleaseError(f"'{path}' is damaged: {error}. Export the run again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ReleaseError(f"'{path}' does not describe a release of this package")
    if content.get("format_version") != FORMAT_VERSION:
        raise ReleaseError(
            f"'{path}' has format version {content.get('format_version')!r}, this package "
            f"reads {FORMAT_VERSION}; use the package version that wrote it"
        )
    try:
        manifest = _Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ReleaseError(
            f"'{path}' is damaged at '{place}': {first['msg']}. Export the run again."
        ) from None
    _check_files(folder, manifest)
    _check_tables(path, manifest)
    return content


def _check_files(folder: Path, manifest: _Manifest) -> None:
    if DENSE_FILE not in manifest.files:
        raise ReleaseError(f"'{folder / MANIFEST}' lacks {DENSE_FILE}; export the run again")
    for name, facts in manifest.files.items():
        why = why_not_inside(folder, name)
        if why is not None:
            raise ReleaseError(
                f"'{folder / MANIFEST}' names the file {name!r}, which {why}; export the run "
                "again, and do not use a release of unknown origin"
            )
        if not (folder / name).is_file():
            raise ReleaseError(f"'{folder}' lacks {name}; export the run again")
        size = (folder / name).stat().st_size
        if size != facts.bytes:
            raise ReleaseError(
                f"'{folder / name}' was changed since the release: it has {size} bytes "
                f"instead of {facts.bytes}; export the run again"
            )


def _check_tables(path: Path, manifest: _Manifest) -> None:
    """No table is larger than its files, so what it says can be allocated."""
    held = dict.fromkeys(manifest.tables, 0)
    for name, facts in manifest.files.items():
        table = name.removeprefix("tables/").rpartition("/")[0]
        if name.startswith("tables/") and table in held:
            held[table] += facts.bytes
    for table, info in manifest.tables.items():
        if info.rows * info.dim * _VALUE_BYTES > held[table]:
            raise ReleaseError(
                f"'{path}' claims {info.rows} rows of {info.dim} for table '{table}', more than "
                f"the {held[table]} bytes of its files hold; export the run again"
            )
