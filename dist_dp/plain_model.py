"""A set of simple values whose complaints a person can read."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_dp.errors import ConfigError
from dist_dp.limits import parse_json


class PlainModel(BaseModel):
    """Frozen values that go to JSON or YAML and back; everything wrong is one `ConfigError`.

    Attributes:
        called: what the whole is called in messages.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    called: ClassVar[str]

    def __init__(self, **values: Any) -> None:
        """Validate ``values``; every complaint becomes one readable `ConfigError`."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._readable(error) from None

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Read it from a mapping of keys and values.

        Raises:
            ConfigError: it is not a mapping, or a value is not valid.
        """
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise cls._readable(error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> Self:
        """Read it back from JSON.

        Raises:
            ConfigError: the text is not JSON, or a value is not valid.
        """
        try:
            values = parse_json(bytes(json_data) if isinstance(json_data, bytearray) else json_data)
        except ValueError as error:
            raise ConfigError(f"the {cls.called} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"the {cls.called} must be a JSON object of keys and values")
        return cls(**values)

    @classmethod
    def _readable(cls, error: ValidationError) -> ConfigError:
        parts = []
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"]) or cls.called
            if item["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                parts.append(f"{key} is not a key of the {cls.called}; known keys: {known}")
            elif item["type"] == "missing":
                parts.append(f"{key} is missing: give a value")
            else:
                message = item["msg"].removeprefix("Value error, ").lower()
                parts.append(f"{key} is {item['input']!r}: {message}")
        return ConfigError("; ".join(parts))
