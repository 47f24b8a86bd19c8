"""Datasets of the Hugging Face hub, by id: `user/name`, a revision behind `@`."""

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


def is_hub_id(item: str, file_types: tuple[str, ...]) -> bool:
    """Whether this can only be a dataset of the hub: nothing local has that name, and it ends as no file's."""
    is_file = Path(item).suffix.lower() in file_types or Path(item).expanduser().exists()
    return not is_file and _HUB_ID.fullmatch(item) is not None


def load_hub(item: str, name: str | None, split: str, *, streaming: bool = False, advice: str) -> Any:
    """datasets.Dataset, or IterableDataset when streaming, of a hub id. name: of its configurations.

    advice: what to look at where it cannot be read. Raises DataError.
    """
    import datasets

    path, _, revision = item.partition("@")
    with hub_errors(item, advice):
        return datasets.load_dataset(path, name, split=split, revision=revision or None, streaming=streaming)


@contextmanager
def hub_errors(item: str, advice: str):
    """Inside, what goes wrong in reading a hub dataset is a DataError that names it."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError extends the base of its HTTP client's errors, whichever client that is.
    http_error = HfHubHTTPError.__bases__[0]
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError, http_error) as error:
        raise DataError(
            f"hub dataset {item!r} could not be read ({type(error).__name__}: {error}), and no local file has that "
            f"name. {advice}"
        ) from error
