"""Config of the `lineage` job."""

from __future__ import annotations

from pathlib import Path

from rayllm.config.base import Config


class LineageConfig(Config):
    model: Path
    """Model folder whose ancestors are shown."""

    picture: Path | None = None
    """SVG file to draw the tree into."""
