"""What is slow to make and the same every time, kept on disk between processes."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """LINEARIZE_CACHE, else `linearize` in XDG_CACHE_HOME or ~/.cache. It may be deleted at any time."""
    own = os.environ.get("LINEARIZE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "linearize")


def kept(path: Path, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, from the file if it is there and whole; else it is made, and written there if that can be.

    The file begins with the SHA-256 of the rest: a damaged one is made again. Warns where nothing can be written.
    """
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    content = stored[DIGEST:]
    if stored[:DIGEST] == hashlib.sha256(content).digest():
        return content
    content = make()
    try:
        _write(path, hashlib.sha256(content).digest() + content)
    except OSError as error:
        warn_unwritable(path.parent, error)
    return content


def warn_unwritable(folder: Path, error: OSError) -> None:
    """One line, once a folder: what would be kept there is made again by every process."""
    reason = error.strerror or error
    warnings.warn(f"nothing is kept in {folder} ({reason}); set LINEARIZE_CACHE to another", stacklevel=2)


def _write(path: Path, content: bytes) -> None:
    """Wholly or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, scratch = tempfile.mkstemp(dir=path.parent)
    try:
        with open(number, "wb") as file:
            file.write(content)
        os.replace(scratch, path)
    except OSError:
        os.unlink(scratch)
        raise
