"""Folders and files that are there wholly or not at all, and folders that a file needs."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import LinearizeError


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


def write_json(path: Path, content, *, allow_nan: bool = True) -> None:
    """Writes a JSON file beside `path`, then renames it. Raises ValueError for a NaN or infinity unless allow_nan."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1, allow_nan=allow_nan) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def check_folder_of(file: str | Path) -> None:
    """Raises LinearizeError where the folder of a file to be written is missing: now, not after hours of work."""
    if not Path(file).parent.is_dir():
        raise LinearizeError(f"{file}: there is no folder {Path(file).parent}; create it first")
