"""GGUF files, unpacked once into an ordinary model folder that is kept on disk.

transformers parses a GGUF's vocabulary again for the config, the tokenizer and the weights, a Python step a token:
ten to twenty seconds for a small model, which loads from a folder in one.
"""

import hashlib
import json
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

from linearize_kernels.disk_cache import cache_folder, warn_unwritable

from .whole_folder import create_folder

LARGEST = 512 << 20  # bytes of a file that is kept unpacked: up to eight times that on disk, in float32


def load_kept(path: Path, dtype: torch.dtype, load, *, errors: tuple[type[Exception], ...]):
    """(model, tokenizer) of a GGUF file in `dtype`, from the folder kept for it, which the first call makes.

    load(folder, gguf): what loads both, from `folder` or, with gguf, from that file in it; errors: what it raises on
    damaged files. A damaged folder is made again, with a warning.
    """
    if path.stat().st_size > LARGEST:
        return load(str(path.parent), path.name)
    folder = kept_folder(path, dtype)
    if folder.exists():
        try:
            return load(str(folder), None)
        except errors as error:
            warnings.warn(f"{folder} does not load ({error}); it is made again", stacklevel=2)
            shutil.rmtree(folder, ignore_errors=True)
    loaded = load(str(path.parent), path.name)
    try:
        create_folder(folder, lambda scratch: [part.save_pretrained(scratch) for part in loaded])
    except OSError as error:
        warn_unwritable(folder.parent, error)
        return loaded
    return load(str(folder), None)  # as every later call does


def kept_folder(path: Path, dtype: torch.dtype) -> Path:
    """Where a file is kept unpacked: named by all that the result depends on, the file by its size and time."""
    stat, name = path.stat(), str(dtype).removeprefix("torch.")
    packages = [version(package) for package in ("transformers", "gguf", "tokenizers")]
    content = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, name, packages]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return cache_folder() / "gguf" / f"{path.stem}-{name}-{key[:16]}"
