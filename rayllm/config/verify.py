"""Config of the `verify` job."""

from __future__ import annotations

from pathlib import Path

from rayllm.config.base import Config


class VerifyConfig(Config):
    model: Path
    """Model folder whose files are compared with its lineage.json."""
