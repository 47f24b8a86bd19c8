"""Folders that are there wholly or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def create_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder beside `folder`, then renames it. Several processes may call at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.tmp-"))
    try:
        fill(scratch)
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster, and made the same.
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
