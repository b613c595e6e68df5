"""Config of the `export` job."""

from __future__ import annotations

from pathlib import Path

from rayllm.config.base import Config


class ExportConfig(Config):
    model: Path
    """Model folder to hand over."""

    out: Path
    """Folder to write: new, or empty."""
