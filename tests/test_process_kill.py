"""`linearize process` killed by SIGKILL while it works, alone and as two processes: no row lost, none twice."""

import errno
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from test_process import lines, make_folder, run, write

from linearize import process as process_module
from linearize import process_files
from linearize.errors import DataError
from linearize.loading import load
from linearize.process import pick_batch
from linearize.process_files import Output

COUNT, BAD = 400, (7, 8, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    words = "the old king so a river runs to town red new blue of it and from".split()
    rows = [{"text": " ".join(words[(i * j) % 15] for j in range(1, 2 + i % 9))} for i in range(COUNT)]
    for i in BAD:
        rows[i] = {"other": i}
    return write(tmp_path_factory.mktemp("rows") / "in.jsonl", rows)


@pytest.fixture(scope="module")
def whole(folder, rows):
    run(folder, rows, rows.parent / "whole.jsonl", batch=16)
    return rows.parent / "whole.jsonl"


def check(target, whole):
    for suffix in ("", ".errors.jsonl"):
        assert lines(Path(f"{target}{suffix}")) == lines(Path(f"{whole}{suffix}"))
    assert not Path(f"{target}.parts").exists()


def start(folder, rows, target, *, launcher=()):
    command = [sys.executable, *launcher, "-m", "linearize.cli", "process", folder, rows, target]
    command += ["--template", "{text} is", "--batch", "2", "--max-new-tokens", "20", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(x) for x in command], env=env, stderr=subprocess.DEVNULL)


def kill_after(process, files, count, *, seconds=120):
    """SIGKILL to the process and its children once each file has so many lines."""
    for _ in range(100 * seconds):
        assert process.poll() is None, f"it ended with {process.returncode} before it was killed"
        if all(f.exists() and f.read_bytes().count(b"\n") >= count for f in files):
            children = psutil.Process(process.pid).children(recursive=True)  # a launcher's outlive it
            for each in (process, *children):
                os.kill(each.pid, signal.SIGKILL)
            process.wait()
            psutil.wait_procs(children)
            return
        time.sleep(0.01)
    raise AssertionError("it wrote no rows")


def test_killed_alone(folder, rows, whole, tmp_path):
    target = tmp_path / "out.jsonl"
    kill_after(start(folder, rows, target), [target], 10)
    counts = run(folder, rows, target, batch=16)
    assert 10 <= counts["resumed_at"] < COUNT and counts["rows"] + counts["errors"] == COUNT - counts["resumed_at"]
    check(target, whole)


def launcher():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]


@pytest.mark.slow
def test_two_processes_killed_and_gone_on_by_two(folder, rows, whole, tmp_path):
    target = tmp_path / "out.jsonl"
    parts = [Path(f"{target}.parts") / f"good-{i}.jsonl" for i in range(2)]
    process = start(folder, rows, target, launcher=launcher())
    kill_after(process, parts, 10)
    numbers = [{r["row"] for r in whole_rows(p)} for p in parts]
    assert all(n % 2 == i for i in range(2) for n in numbers[i]), "each every other row"
    assert not target.exists() and len(numbers[0] | numbers[1]) < COUNT
    assert start(folder, rows, target, launcher=launcher()).wait(240) == 0
    check(target, whole)


def whole_rows(path):
    return [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n")[:-1]]


# --- files of several processes ----------------------------------------------------------------------------


def parts_of(tmp_path, done):
    """Parts that `len(done)` processes left behind; OUT has rows 0 and 1."""
    target = tmp_path / "out.jsonl"
    write(target, [{"row": 0}, {"row": 1}])
    for rank, numbers in enumerate(done):
        output = Output(target, rank=rank, world=len(done))
        for n in numbers:
            (output.write_error if n == 3 else output.write)({"row": n})
        output.close()
    return target


def test_one_process_goes_on_where_three_were_killed(tmp_path):
    target = parts_of(tmp_path, [[6], [4], [2, 3, 5]])
    with (tmp_path / "out.jsonl.parts" / "good-0.jsonl").open("a") as file:
        file.write('{"row": 7, "te')
    output = Output(target)
    left = [n for n in range(9) if not output.is_done(n)]
    assert left == [7, 8]
    for n in left:
        output.write({"row": n})
    output.close()
    output.finish()
    assert [r["row"] for r in lines(target)] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [r["row"] for r in lines(Path(f"{target}.errors.jsonl"))] == [3]
    assert not Path(f"{target}.parts").exists()


@pytest.mark.parametrize("world", [1, 2])
def test_two_do_not_write_the_same_rows(tmp_path, world):
    target = tmp_path / "out.jsonl"
    with closing(Output(target, world=world)) as output:
        output.write({"row": 0})
        with pytest.raises(DataError, match="another process is writing there"):
            Output(target, world=world)
        if world > 1:
            Output(target, rank=1, world=world).close()  # that one has files of its own
    with closing(Output(target, world=world)) as output:
        assert output.is_done(0)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(refuse.errno, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    refuse.errno = errno.ENOSYS
    Output(tmp_path / "out.jsonl").close()
    assert "has no locks" in capsys.readouterr().err
    refuse.errno = errno.EIO
    with pytest.raises(DataError, match="cannot be written: .*no locks"):
        Output(tmp_path / "out.jsonl")


def test_killed_while_parts_are_joined(tmp_path):
    target = parts_of(tmp_path, [[2, 4], [3, 5]])
    with target.open("a") as file:
        file.write('{"row": 2}\n{"row": 4')  # row 3, an error, comes before 4
    output = Output(target)
    assert all(map(output.is_done, range(6))) and output.start == 3
    output.close()
    output.finish()
    assert [r["row"] for r in lines(target)] == [0, 1, 2, 4, 5]
    assert [r["row"] for r in lines(Path(f"{target}.errors.jsonl"))] == [3]


def test_parts_that_lack_a_row_are_not_joined(tmp_path):
    target = parts_of(tmp_path, [[2], [5]])
    before = target.read_bytes()
    output = Output(target)
    output.close()
    with pytest.raises(DataError, match="lacks rows"):
        output.finish()
    assert target.read_bytes() == before and Path(f"{target}.parts").exists()


def test_a_full_disk_is_said_and_costs_no_row(tmp_path):
    target, limits = tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    output = Output(target)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a longer file is refused as on a full disk
    try:
        with pytest.raises(DataError, match="out.jsonl cannot be written: .*same command"), closing(output):
            for n in range(100):
                output.write({"row": n})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.stat().st_size == 1000 and not target.read_bytes().endswith(b"\n")
    with closing(Output(target)) as output:
        assert 50 < output.start < 100
        for n in range(output.start, 100):
            output.write({"row": n})
    assert [r["row"] for r in lines(target)] == list(range(100))


def test_what_waits_for_the_disk(tmp_path, monkeypatch):
    """Not every row; but before one file goes on, what was written to the other is there."""
    events, now = [], [0.0]
    names, sync, write_line = {}, os.fsync, process_files._write
    monkeypatch.setattr(process_files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(process_files.os, "fsync", lambda number: events.append(names[number]) or sync(number))
    monkeypatch.setattr(process_files, "_write", lambda file, row: events.append(row["row"]) or write_line(file, row))
    output = Output(tmp_path / "out.jsonl")
    names.update({output._good.fileno(): "good", output._bad.fileno(): "bad"})
    for n in range(11):
        now[0] += 0.3
        (output.write_error if n == 5 else output.write)({"row": n})
        assert b'"row": %d}\n' % n in Path(f"{tmp_path}/out.jsonl{'.errors.jsonl' * (n == 5)}").read_bytes()
    output.close()
    assert events == [0, 1, 2, "good", 3, 4, "good", 5, "bad", 6, 7, 8, 9, "good", 10, "good"]


# --- batches -----------------------------------------------------------------------------------------------


def test_batch_from_free_memory(folder, monkeypatch):
    model, _ = load(folder, device="cpu")
    sizes = {}
    for free in (0, 2 * 10**5, 4 * 10**5, 10**12):
        monkeypatch.setattr(process_module, "free_bytes", lambda device, free=free: free)
        sizes[free] = pick_batch(model, rows=1000)
    assert sizes[0] == 1 and sizes[10**12] == process_module.MAX_BATCH["cpu"]
    assert 1 < sizes[4 * 10**5] < 32 and sizes[2 * 10**5] <= sizes[4 * 10**5]
    assert pick_batch(model, rows=3) == 4
    state = process_module.read(model, torch.zeros(1, 1, dtype=torch.long)).num_bytes()
    assert sizes[4 * 10**5] * state * 3 <= 4 * 10**5 / 2
