"""Folders to continue from: written aside, renamed when complete, the newest few kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Checkpoints:
    """``step-000010`` folders under one folder. A folder of that name is complete; ``partial-`` ones are not."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def latest(self) -> tuple[int, Path] | None:
        """(step, folder) of the newest complete checkpoint."""
        complete = self._complete()
        return complete[-1] if complete else None

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to fill; when the block ends without an error it becomes the newest checkpoint."""
        partial = self.folder / f"partial-{step:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        final = self.folder / f"step-{step:06d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for _, old in self._complete()[: -self.keep]:
            shutil.rmtree(old)

    def _complete(self) -> list[tuple[int, Path]]:
        return sorted((int(path.name.removeprefix("step-")), path) for path in self.folder.glob("step-*"))
