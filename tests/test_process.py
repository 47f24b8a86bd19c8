"""`linearize process`: every row once and in order, bad ones apart, and the same files after a kill at any moment."""

import json

import datasets
import pytest
import torch
from pico import make_tokens
from test_export import CHAT, make_tokenizer, save_model

from linearize import cli, process_files
from linearize import process as process_module
from linearize.architecture import linearize_
from linearize.errors import DataError, LinearizeError
from linearize.export import export
from linearize.generation import generate_text
from linearize.loading import load_any
from linearize.process import process
from linearize.process_prompts import fill
from linearize.recipe import AttentionSettings, FeatureMapSettings, KeepSoftmaxSettings
from linearize.sampling import Sampling
from linearize.state import read

TEXTS = ["the old king", "so", "a river runs to the town", "red", "the new and the blue of it", "to and from"]
TEMPLATE = "{text} is"


KEPT = {"linear": {}, "kept": dict(layers=[1], heads=[[0, 1]])}


def make_folder(path, kept=None):
    teacher = save_model(path)
    model, _ = load_any(teacher, device="cpu")
    keep = KeepSoftmaxSettings(**(kept or {}))
    linearize_(model, AttentionSettings(window=6, sinks=2, feature_map=FeatureMapSettings(dim=4), keep_softmax=keep))
    model.generation_config.eos_token_id = [1, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]  # rows end here and there
    export(model, make_tokenizer(chat_template=CHAT), teacher.parent / "out", dtype="auto", files={})
    return teacher.parent / "out"


@pytest.fixture(scope="module", params=KEPT)
def folder(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("teacher"), KEPT[request.param])


def write(path, rows):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in rows), encoding="utf-8")
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(folder, source, target, **options):
    options = {"template": TEMPLATE, "batch": 2, "max_new_tokens": 20, "device": "cpu", **options}
    return process(folder, source, target, **options)


def test_every_row_is_answered_once_in_order_as_alone(folder, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"text": t, "id": i} for i, t in enumerate(TEXTS)])
    counts = run(folder, source, tmp_path / "out.jsonl")
    rows = lines(tmp_path / "out.jsonl")
    assert [r["row"] for r in rows] == [r["id"] for r in rows] == list(range(6)) and counts["rows"] == 6
    for row in rows:
        (alone,) = generate_text(folder, prompts=[f"{row['text']} is"], max_new_tokens=20, device="cpu")
        assert row["output"] == alone
    assert counts["tokens"] < 6 * 20, "padding is no answer"
    assert len({len(r["output"]) for r in rows}) > 1, "rows of several lengths, so that slots were filled again"
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()
    run(folder, source, tmp_path / "again.jsonl", batch=5)
    assert lines(tmp_path / "again.jsonl") == rows
    assert "tokens/s" in capsys.readouterr().out


def test_a_common_prefix_is_read_once(folder, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS[:3]])
    run(folder, source, tmp_path / "out.jsonl", prefix="the town of the old king: " * 3)
    run(folder, source, tmp_path / "whole.jsonl", template="the town of the old king: " * 3 + TEMPLATE)
    assert lines(tmp_path / "out.jsonl") == lines(tmp_path / "whole.jsonl")


def test_a_prefix_in_a_chat_is_in_the_message(folder, tmp_path):
    source, long = write(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS[:3]]), "the {town} of the old king: " * 3
    run(folder, source, tmp_path / "out.jsonl", chat=True, prefix=long)
    whole = long.replace("{", "{{").replace("}", "}}") + TEMPLATE
    run(folder, source, tmp_path / "whole.jsonl", chat=True, template=whole)
    assert lines(tmp_path / "out.jsonl") == lines(tmp_path / "whole.jsonl")


def test_bad_rows_go_to_the_errors_and_nothing_else_is_lost(folder, tmp_path, capsys):
    bad = ["{broken", "[1]", {"other": 1}, {"text": "king " * 200}, ""]
    source = write(tmp_path / "in.jsonl", [{"text": "the old"}, *bad, {"text": "so"}])
    counts = run(folder, source, tmp_path / "out.jsonl")
    assert [r["row"] for r in lines(tmp_path / "out.jsonl")] == [0, 6] and counts["errors"] == 5
    errors = lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [e["row"] for e in errors] == [1, 2, 3, 4, 5]
    reasons = ("not JSON", "not an object", "columns are other", "positions", "empty line")
    for error, said, given in zip(errors, reasons, bad, strict=True):
        assert said in error["error"] and error["input"] == (json.loads(given) if given == "[1]" else given)
    assert str(tmp_path / "out.jsonl.errors.jsonl") in capsys.readouterr().out
    source = write(tmp_path / "in2.jsonl", [{"text": ""}, {"text": "so"}])
    assert run(folder, source, tmp_path / "out2.jsonl", template="{text}")["errors"] == 1


def test_what_json_takes_and_utf_8_does_not(folder, tmp_path):
    """Half a character, as texts cut by UTF-16 units have it, and a line of brackets."""
    half, bad = "a\ud83d", ["[" * 100_000, {"other": "\ud83d"}]
    source = write(tmp_path / "in.jsonl", [{"text": half}, *bad, {"text": "a?", "id": half}])
    counts = run(folder, source, tmp_path / "out.jsonl")
    assert counts["rows"] == 2 and counts["errors"] == 2
    first, second = lines(tmp_path / "out.jsonl")
    assert first["text"] == second["id"] == half, "as it came"
    assert first["output"] == second["output"] != ""
    errors = lines(tmp_path / "out.jsonl.errors.jsonl")
    assert [e["input"] for e in errors] == bad and "recursion depth" in errors[0]["error"]
    assert run(folder, source, tmp_path / "out.jsonl")["resumed_at"] == 4


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        ("{text}", '"so"', "not an object but a str"),
        ("{text}", {"text": None}, "the column 'text' is null"),
        ("{text} {of.name}", {"text": "so", "of": None}, "the column 'of' is null"),
        ("{text[a]}", {"text": "so"}, "asks for string indices must be integers"),
        ("{text:d}", {"text": "so"}, "asks for Unknown format code"),
        ("{} {text}", {"text": "so"}, "positional"),
        ("{text:c}", {"text": 10**30}, "asks for Python int too large"),
        ("Review: {text}", {"text": ""}, "no text in 'text'"),
        ("{text} {of}", {"text": " \n", "of": ""}, "no text in 'text', 'of'"),
    ],
)
def test_a_row_that_makes_no_prompt(template, row, said):
    row = json.loads(row) if isinstance(row, str) else row
    with pytest.raises(DataError, match=said):
        fill(template, row)
    good = {"text": "so", "of": {"name": "x"}, "more": ""}
    assert fill("{text}{more} {of[name]} {{}}", good) == "so x {}"


def test_what_fits_no_row_is_refused_before_anything_is_written(folder, tmp_path):
    """Rows that are errors count as done: the same command with a right template would not take them up again."""
    target = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", ["{broken", {"text": "so"}])
    for template, said in (("{review}", "fits no row.*not JSON"), ("{text", "expected '}' before end of string")):
        with pytest.raises(DataError, match=said):
            run(folder, source, target, template=template)
        assert not target.exists()
    with pytest.raises(LinearizeError, match="no folder .*; create it first"):
        run(folder, source, tmp_path / "none" / "out.jsonl")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["so"]})}).save_to_disk(str(tmp_path / "all"))
    with pytest.raises(DataError, match="several splits.*of train"):
        run(folder, tmp_path / "all", target)


def test_a_killed_run_goes_on_without_losing_or_repeating_a_row(folder, tmp_path, monkeypatch):
    rows = [{"text": t} for t in TEXTS]
    rows[2] = {"other": 1}
    source = write(tmp_path / "in.jsonl", rows)
    options = {"sampling": Sampling(temperature=1.0, seed=5)}
    run(folder, source, tmp_path / "whole.jsonl", **options)
    write_line = process_files._write
    for stop in range(6):
        target, written = tmp_path / f"{stop}.jsonl", []

        def killed(file, row, stop=stop, written=written):
            if len(written) == stop:
                file.write('{"text": "half a li')
                file.flush()
                raise KeyboardInterrupt
            written.append(row)
            write_line(file, row)

        monkeypatch.setattr(process_files, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, source, target, **options)
        monkeypatch.setattr(process_files, "_write", write_line)
        assert run(folder, source, target, **options)["resumed_at"] == stop
        for suffix in ("", ".errors.jsonl"):
            assert lines(tmp_path / f"{stop}.jsonl{suffix}") == lines(tmp_path / f"whole.jsonl{suffix}")
    twice = write(tmp_path / "twice.jsonl", [{"text": "so"}] * 2)
    run(folder, twice, tmp_path / "samples", **options)
    first, second = lines(tmp_path / "samples")
    assert first["output"] != second["output"], "a row draws for itself"
    before = (tmp_path / "whole.jsonl").read_bytes()
    assert run(folder, source, tmp_path / "whole.jsonl", **options)["rows"] == 0
    assert (tmp_path / "whole.jsonl").read_bytes() == before, "nothing left to do"


def test_rows_are_gone_on_with_in_the_same_way_only(folder, tmp_path):
    source, target = write(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS[:3]]), tmp_path / "out.jsonl"
    run(folder, source, target)
    before, settings = target.read_bytes(), tmp_path / "out.jsonl.settings.json"
    other = write(tmp_path / "other.jsonl", [{"text": t} for t in TEXTS])
    for changed, given in (
        ("template", dict(template="{text} was")),
        ("chat, prefix", dict(chat=True, prefix="so ")),
        ("max_new_tokens, stop", dict(max_new_tokens=9, stop=["a"])),
        ("sampling", dict(sampling=Sampling(temperature=1.0))),
        ("source", dict(source=other)),
    ):
        with pytest.raises(DataError, match=f"answered with another {changed} .see"):
            run(**{"folder": folder, "source": source, "target": target, **given})
    assert target.read_bytes() == before
    run(folder, write(source, [{"text": t} for t in TEXTS[:4]]), target, batch=1)
    assert len(lines(target)) == 4, "rows that have been added"
    settings.unlink()
    run(folder, write(source, [{"text": t} for t in TEXTS[:5]]), target, template="{text} was")
    assert len(lines(target)) == 5 and json.loads(settings.read_text())["template"] == "{text} was"
    with pytest.raises(DataError, match="holds 5 rows, the source 2"):
        run(folder, write(source, [{"text": t} for t in TEXTS[:2]]), target, template="{text} was")


def test_other_sources_and_the_command_line(folder, tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS[:2]})
    data.to_parquet(str(tmp_path / "in.parquet"))
    data.save_to_disk(str(tmp_path / "disk"))
    source = write(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS[:2]])
    found = []
    for given in (source, tmp_path / "in.parquet", tmp_path / "disk"):
        target = tmp_path / f"{given.name}.out"
        words = ["process", folder, given, target, "--template", TEMPLATE, "--chat", "--device", "cpu"]
        assert cli.main([*map(str, words), "--max-new-tokens", "6"]) == 0
        found.append(lines(target))
    assert found[0] == found[1] == found[2] and len(found[0]) == 2


def test_an_answer_ends_with_a_stop_text(folder, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    run(folder, source, tmp_path / "whole.jsonl")
    whole = [r["output"] for r in lines(tmp_path / "whole.jsonl")]
    stop = max(whole, key=len)[2:4]  # early in what is decoded between two looks
    run(folder, source, tmp_path / "out.jsonl", stop=[stop])
    expected = [text[: text.index(stop) + 2] if stop in text else text for text in whole]
    assert [r["output"] for r in lines(tmp_path / "out.jsonl")] == expected != whole


def test_every_option_of_sampling_reaches_the_rows(folder, tmp_path, monkeypatch):
    given, make = [], process_module.Decoder
    monkeypatch.setattr(process_module, "Decoder", lambda *a, **k: given.append(k["sampling"]) or make(*a, **k))
    words = ["process", folder, write(tmp_path / "in.jsonl", [{"text": "so"}]), tmp_path / "out.jsonl", "--top-k", 9]
    words += "--temperature 0.5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 3 --stop a".split()
    assert cli.main([*map(str, words), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert given == [Sampling(0.5, 9, 0.9, 0.1, 1.2, 3)]


def test_a_dataset_of_the_hub(folder, tmp_path, monkeypatch):
    asked, target = [], tmp_path / "out.jsonl"

    def load_dataset(path, name, *, split, revision, streaming):
        asked.append((path, name, split, revision, streaming))
        if split == "none":
            raise ValueError("Unknown split")
        return datasets.Dataset.from_dict({"text": ["so", "no"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = ["process", folder, "user/set@v1", target, "--name", "plain", "--split", "test"]
    for _ in range(2):  # the second time there is nothing left to do
        assert cli.main([*map(str, words), "--max-new-tokens", "2", "--device", "cpu"]) == 0
        assert [row["text"] for row in lines(target)] == ["so", "no"]
    assert asked == [("user/set", "plain", "test", "v1", False)] * 2
    with pytest.raises(DataError, match="answered with another source"):
        process_module.process(folder, "user/set@v1", target, name="plain", max_new_tokens=2, device="cpu")
    assert asked[-1][2] == "train"
    with pytest.raises(DataError, match="hub dataset 'user/set' could not be read .*--split"):
        process_module.process(folder, "user/set", tmp_path / "other.jsonl", split="none")
    with pytest.raises(DataError, match="in.jsonl is no dataset of the hub: --name and --split"):
        process_module.process(folder, write(tmp_path / "in.jsonl", [{"text": "so"}]), target, split="test")


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no such .jsonl or .parquet"):
        run(folder, tmp_path / "none.jsonl", tmp_path / "out")
    source = write(tmp_path / "in.jsonl", [{"text": "so"}])
    target = tmp_path / "mine.jsonl"
    for content in ('{"x": 1}\n', '{"row": 7}\n', "a note", '{"x": 1}\nand', '[{"row": 0}]\n'):
        target.write_text(content)
        with pytest.raises(DataError, match="another output file"):
            run(folder, source, target)
        assert target.read_text() == content, "it stays as it was"


def test_an_answer_replaces_no_column(folder, tmp_path, capsys):
    rows = [{"text": "so", "output": "it is"}, {"text": "so"}]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run(folder, source, target)["errors"] == 1
    assert "a column 'output' already" in lines(tmp_path / "out.jsonl.errors.jsonl")[0]["error"]
    with pytest.raises(DataError, match="nothing was done.*'output' already"):
        run(folder, target, tmp_path / "again.jsonl")
    words = ["process", folder, source, tmp_path / "named.jsonl", "--template", TEMPLATE, "--field", "mine"]
    assert cli.main([*map(str, words), "--max-new-tokens", "20", "--device", "cpu"]) == 0
    first, second = lines(tmp_path / "named.jsonl")
    with pytest.raises(DataError, match="--field row"):
        run(folder, source, tmp_path / "numbers.jsonl", field_name="row")
    assert first["output"] == "it is" and first["mine"] == second["mine"] == lines(target)[0]["output"]


def test_rows_and_answers_are_two_files(folder, tmp_path):
    """Numbered rows without a last newline look like answers of a run that was killed in the middle of a line."""
    source = tmp_path / "in.jsonl.errors.jsonl"
    source.write_text('{"row": 0, "text": "so"}\n{"row": 1, "text": "no"}')
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", tmp_path / "in.jsonl"):
        with pytest.raises(DataError, match="where rows are read"):
            run(folder, source, target)
        assert source.read_text().endswith('"no"}')


def test_files_that_cannot_be_read_or_written(folder, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", [{"text": "so"}])
    for name in ("out", "other.errors.jsonl"):
        (tmp_path / name).mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    for target in ("out", "other", "null"):
        with pytest.raises(DataError, match="cannot be written: .*directory"):
            run(folder, source, tmp_path / target)
    data = datasets.Dataset.from_dict({"text": ["so"]})
    for name in ("none", "cut"):
        data.select(range(name == "cut")).save_to_disk(str(tmp_path / name))
    (tmp_path / "cut" / "data-00000-of-00001.arrow").write_bytes(b"cut")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut")
    for name in ("none", "cut", "cut.parquet"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            run(folder, tmp_path / name, tmp_path / "never")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(DataError, match="not yours to read"):
        run(folder, source, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("given", [None, 120])
def test_rows_get_the_room_that_the_longest_needs(tmp_path, monkeypatch, given):
    """Where softmax has been kept, room is memory: the longest prompt says how much, or the user."""
    folder, decoders = make_folder(tmp_path / "kept", KEPT["kept"]), []
    make = process_module.Decoder
    monkeypatch.setattr(process_module, "Decoder", lambda *a, **k: decoders.append(k["max_length"]) or make(*a, **k))
    rows = [{"text": "so"}, {"text": "a" * 97}, {"text": "b" * 98}, {"other": 1}, {"text": "king " * 200}]
    counts = run(folder, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", max_length=given)
    assert decoders == [given or 98 + 3 + 20] and counts["errors"] == (3 if given else 2)
    errors = [e["error"] for e in lines(tmp_path / "out.jsonl.errors.jsonl")]
    assert "columns" in errors[-2] and "1,003 tokens and 20 new ones are more than the model's 512" in errors[-1]
    if given:
        assert errors[0] == "101 tokens and 20 new ones are more than the 120 of max_length"


@pytest.mark.parametrize(("least", "off"), [(10, True), (9, None)])
def test_only_a_long_run_is_compiled(folder, tmp_path, monkeypatch, least, off):
    """Five rows, two at once, of up to three tokens: nine steps at most."""
    given, make = [], process_module.Decoder
    monkeypatch.setattr(process_module, "COMPILED_FROM", least)
    monkeypatch.setattr(
        process_module, "Decoder", lambda *a, **k: given.append(k["disable_compile"]) or make(*a, **k)
    )
    source = write(tmp_path / "in.jsonl", [{"text": "so"}] * 5)
    run(folder, source, tmp_path / "out.jsonl", max_new_tokens=3, batch=2)
    assert given == [off]


def test_static_slots_hold_just_the_longest_row(tmp_path, monkeypatch):
    """In the interpreter, which is slow, 8 tokens are folded at once instead of 32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        tl = pytest.importorskip("triton.language", reason="Triton is not installed")
        monkeypatch.setattr("linearize_kernels.decode.FOLD", 8)
        monkeypatch.setattr("linearize_kernels.decode_kernels.FOLD", tl.constexpr(8))
    folder = make_folder(tmp_path / "kept", KEPT["kept"])
    source = write(tmp_path / "in.jsonl", [{"text": t} for t in ("so", "the old", "a")])
    for mode in ("eager", "static"):
        run(folder, source, tmp_path / mode, max_new_tokens=3, mode=mode, prefix="it is ", device=device)
    assert lines(tmp_path / "static") == lines(tmp_path / "eager") and len(lines(tmp_path / "static")) == 3


@pytest.mark.parametrize("kept", ["linear", "kept"])
def test_the_longest_prompt_counts_for_the_batch(tmp_path, monkeypatch, kept):
    model, _ = load_any(make_folder(tmp_path / "m", KEPT[kept]), device="cpu")
    monkeypatch.setattr(process_module, "free_bytes", lambda device: 10**6)
    short, long = (process_module.pick_batch(model, rows=1000, length=n) for n in (10, 400))
    state = read(model, make_tokens(1, 400)).num_bytes()
    assert (long < short) == (kept == "kept") and long * 3 * state <= 10**6 / 2
