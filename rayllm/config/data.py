"""Where a job's data is: one path, or several with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from rayllm.config.base import Config


class WeightedPath(Config):
    """One of several sources of a job's data."""

    path: Path
    """A data file, a folder of data files, or `hf://datasets/ORG/NAME`."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How often a row of this source is used in a pass over the data: 2 uses every row twice, 0.5 a half of the rows,
    drawn once with the seed."""


def _as_sources(value: Any) -> Any:
    """A list's items may be paths or {path, weight}."""
    if isinstance(value, str | Path):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"expected a path, or a list of {{path, weight}}, got {value!r:.80}")
    sources = []
    for index, item in enumerate(value):
        try:
            sources.append(WeightedPath.model_validate({"path": item} if isinstance(item, str | Path) else item))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or repr(item)
            raise ValueError(f"item {index}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    return tuple(sources)


DataPaths = Annotated[Path | tuple[WeightedPath, ...], BeforeValidator(_as_sources)]
"""One path, or a list of paths and {path, weight}. Formats: rayllm/data/formats.py."""


def sources_of(paths: Path | tuple[WeightedPath, ...]) -> tuple[WeightedPath, ...]:
    """One path is one source of weight 1."""
    return (WeightedPath(path=paths),) if isinstance(paths, Path) else tuple(paths)
