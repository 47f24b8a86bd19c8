"""The files of `linearize process`: rows in, answers out, and which rows are on the disk already.

One process writes straight to OUT and OUT.errors.jsonl. Several write a pair of files each into OUT.parts, which the
first puts into OUT, in order, when all have ended. Every line says its row, so that what is on the disk tells what is
left to do, after a kill at any moment and with any number of processes; OUT.settings.json tells that it is the same
work. What a kill leaves behind is all that was written; after a loss of power it is what was put on the disk, at least
every SYNC_EVERY seconds.
"""

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError
from .file_lock import lock
from .hub_datasets import is_hub_id, load_hub
from .whole_folder import check_folder_of, write_json

FILE_TYPES = (".jsonl", ".json", ".parquet")
SYNC_EVERY = 1.0  # seconds; a wait for the disk after each row would cost more than a short answer


@dataclass(frozen=True)
class BrokenRow:
    """A line that is no JSON, and why."""

    line: str
    reason: str


@dataclass(frozen=True)
class _JsonLines:
    """The rows of a .jsonl file, read again each time that they are gone through."""

    path: Path

    def __len__(self) -> int:
        with self.path.open("rb") as file:
            return sum(1 for _ in file)

    def __iter__(self) -> Iterator:
        with self.path.open("rb") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8; lists in lists in lists ...
                    reason = f"not JSON: {error}" if line.strip() else "an empty line"
                    yield BrokenRow(line.decode("utf-8", "backslashreplace").rstrip("\r\n"), reason)


def open_rows(source, *, name: str | None = None, split: str | None = None) -> Collection:
    """The rows in order, as often as wanted; a line that is no JSON comes as a BrokenRow. Raises DataError.

    name, split: of a hub dataset, which of its configurations and splits (by default "train").
    """
    path = Path(source)
    if is_from_hub(source):
        advice = "Check the id, --name, --split and connection, or give a local file."
        return load_hub(str(source), name, split or "train", advice=advice)
    if name is not None or split is not None:
        raise DataError(f"{source} is no dataset of the hub: --name and --split choose what to read of one")
    if path.is_file() and not os.access(path, os.R_OK):
        raise DataError(f"{source} is not yours to read: chmod u+r {source}, or ask its owner")
    if path.suffix in (".jsonl", ".json") and path.is_file():
        return _JsonLines(path)
    if path.suffix == ".parquet" and path.is_file():
        return _read_dataset(path, lambda datasets: datasets.Dataset.from_parquet(str(path)))
    if (path / "dataset_info.json").is_file():
        return _read_dataset(path, lambda datasets: datasets.load_from_disk(str(path)))
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
        raise DataError(f"{source} holds several splits: give the folder of one, {source}/NAME, of {splits}")
    raise DataError(
        f"{source}: no such .jsonl or .parquet file, nor a folder made by Dataset.save_to_disk, nor a dataset's id"
    )


def is_from_hub(source) -> bool:
    """Whether rows are read from a dataset of the hub."""
    return is_hub_id(str(source), FILE_TYPES)


def _read_dataset(path: Path, read):
    """What `read` makes of it, given the package. Raises DataError for files that are damaged or hold no row."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return read(datasets)
    except (OSError, ValueError, IndexError, DatasetsError) as error:  # an IndexError: no file of rows in the folder
        raise DataError(f"{path} cannot be read: it holds no rows, or is damaged ({error})") from error


class Output:
    """Where this process writes, and which rows are done: `start` rows in OUT, and those of `done` in parts.

    source: where rows are read. rank, world: this process's number, and how many there are. Raises DataError for
    files that this command did not write or reads from, which stay as they are, for such as cannot be written, and
    where another process writes them.
    """

    def __init__(self, target, *, source=None, rank: int = 0, world: int = 1):
        self.target, self.errors = Path(target), Path(f"{target}.errors.jsonl")
        self.parts = Path(f"{target}.parts")
        check_folder_of(self.target)
        for path in (self.target, self.errors):
            if path.exists() and not path.is_file():  # reading what is in it might never end
                raise DataError(f"{path} cannot be written: a directory, pipe or device. Give another output file.")
            if source is not None and path.exists() and path.samefile(source):
                raise DataError(f"{source} is where rows are read; give another output file")
        with self._writing():
            self._open(rank, world)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises DataError where the disk is full, or will not take what is written for another reason."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.target} cannot be written: {error}. Mend that and give the same command again, which goes on "
                "from what is there, or give another output file."
            ) from error

    def _open(self, rank: int, world: int) -> None:
        mine = self.target, self.errors
        if world > 1 or self.parts.exists():
            self.parts.mkdir(exist_ok=True, parents=True)
            mine = self.parts / f"good-{rank}.jsonl", self.parts / f"bad-{rank}.jsonl"
        # half a character of a row has no UTF-8: it becomes an escape, the one by which JSON knows it
        self._good, self._bad = (path.open("a", encoding="utf-8", errors="backslashreplace") for path in mine)
        why = "another process is writing there, and both would answer every row. Wait for it, or end it."
        lock(self._good, DataError(f"{self._good.name}: {why}"))  # before anything is read
        good, bad = ([row for row, *_ in _whole_lines(path)] for path in (self.target, self.errors))
        self.start = len(good) + len(bad)
        if sorted(good + bad) != list(range(self.start)) or sorted(good) != good:
            raise _foreign(self.target)
        self.done = {row for path in self._part_files() for row, *_ in _whole_lines(path)}
        for path in mine:
            _cut_half_a_line(path)
        self._newest, self._synced = self._good, time.monotonic()

    def check_settings(self, settings: dict, *, rows: int, first: bool = True) -> None:
        """Raises DataError where rows were done with other settings, or there are more than the source has.

        settings: what decides the answers, kept in OUT.settings.json, which the first process writes.
        """
        path, settings = Path(f"{self.target}.settings.json"), json.loads(json.dumps(settings))
        if self.start > rows:
            raise DataError(f"{self.target} holds {self.start:,} rows, the source {rows:,}; give another output file")
        if (self.start or self.done) and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if changed := [name for name, value in settings.items() if before.get(name) != value]:
                raise DataError(
                    f"{self.target} holds rows answered with another {', '.join(changed)} (see {path}). Give another "
                    "output file, or remove that one to go on all the same."
                )
        elif first:
            write_json(path, settings)

    def is_done(self, row: int) -> bool:
        return row < self.start or row in self.done

    def write(self, row: dict) -> None:
        """An answered row."""
        self._add(self._good, row)

    def write_error(self, row: dict) -> None:
        self._add(self._bad, row)

    def _add(self, file, row: dict) -> None:
        """On the disk neither file runs ahead of the other: what was written to it is there before this goes on."""
        with self._writing():
            if file is not self._newest or time.monotonic() - self._synced > SYNC_EVERY:
                self._sync()
            self._newest = file
            _write(file, row)

    def _sync(self) -> None:
        os.fsync(self._newest.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        with self._writing():
            self._sync()
            self._good.close()
            self._bad.close()

    def finish(self) -> None:
        """One process, when all have closed theirs: parts go into OUT in order. Killed here, it can be done again."""
        if self.parts.exists():
            for path in (self.target, self.errors):
                _cut_half_a_line(path)
            with self._writing():
                self._join_parts()
            shutil.rmtree(self.parts)
        if self.errors.exists() and not self.errors.stat().st_size:
            self.errors.unlink()

    def _join_parts(self) -> None:
        where = {}  # row -> (file, first byte, bytes)
        for path in self._part_files():
            where |= {row: (path, *place) for row, *place in _whole_lines(path) if row >= self.start}
        if sorted(where) != list(range(self.start, self.start + len(where))):
            raise DataError(f"{self.parts} lacks rows; give the same command again")
        files = {path: path.open("rb") for path in self._part_files()}
        with self.target.open("ab") as good, self.errors.open("ab") as bad:
            for row in sorted(where):
                path, first, count = where[row]
                files[path].seek(first)
                out = bad if path.name.startswith("bad-") else good
                out.write(files[path].read(count))
                out.flush()  # so that neither file runs ahead of the other
            for out in (good, bad):
                os.fsync(out.fileno())
        for file in files.values():
            file.close()

    def _part_files(self) -> list[Path]:
        return sorted(self.parts.glob("*.jsonl"))


def _whole_lines(path: Path) -> Iterator[tuple[int, int, int]]:
    """(row, first byte, bytes) of each line that ends. Raises DataError for lines that are none of ours."""
    if not path.exists():
        return
    place = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                if place == 0 and not line.startswith(b"{"):
                    raise _foreign(path)
                return
            try:
                yield int(json.loads(line)["row"]), place, len(line)
            except (ValueError, KeyError, TypeError) as error:
                raise _foreign(path) from error
            place += len(line)


def _cut_half_a_line(path: Path) -> None:
    """Cuts off a line that was being written when the process was killed."""
    if path.exists():
        whole = sum(count for _, _, count in _whole_lines(path))
        os.truncate(path, whole)


def _foreign(path: Path) -> DataError:
    return DataError(f"{path} holds what this command did not write; give another output file")


def _write(file, row: dict) -> None:
    """One line, the system's as soon as it is written, whatever becomes of this process."""
    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    file.flush()
