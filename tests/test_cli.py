"""The command line: what it parses, what it hands on, how it fails; and that it starts fast."""

import importlib
import importlib.metadata
import inspect
import io
import json
import os
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from linearize import __version__, cli
from linearize.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")])


def run(*args: str, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own, away from the repository."""
    return subprocess.run(
        [sys.executable, "-m", "linearize.cli", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PATH},
        timeout=60,
        **options,
    )


@pytest.fixture
def fake_module(monkeypatch):
    """Puts a stand-in for a module of ours in its place, with the given functions."""

    def put(name: str, **functions):
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def test_help_is_fast_and_shows_every_verb(tmp_path):
    seconds = []
    for _ in range(4):  # the first one writes the bytecode; others may share the machine with other work
        start = time.perf_counter()
        result = run("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0
    for verb in ("convert", "generate", "eval", "process", "bench", "report", "sweep", "doctor", "recipes"):
        assert f"\n    {verb} " in result.stdout
    assert "linearize convert my.yaml" in result.stdout
    assert min(seconds) < 1


def test_start_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, linearize, linearize.cli, linearize.recipe\n"
        "linearize.recipe.load_recipe('quickstart')\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'accelerate', 'numpy', 'lm_eval'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": PATH}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("linearize.convert", {"datasets", "gguf", "lm_eval", "matplotlib", "pyarrow", "rich", "linearize_eval"}),
        ("linearize.doctor", {"accelerate", "datasets", "peft", "transformers"}),
    ],
)
def test_a_verb_imports_only_what_it_begins_with(module, late, tmp_path):
    """What only some recipes need, or a later stage, is imported there."""
    code = f"import sys, {module}\nprint('{module}' in sys.modules, sorted({late} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": PATH}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.stdout.strip() == "True []", result.stderr


def test_launcher_of_a_clone_works_from_anywhere(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "cli.py"), "recipes", "ls"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "quickstart " in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"linearize {__version__}\n"


SAMPLING = ["--max-new-tokens", "--temperature", "--top-p", "--seed", "--top-k", "--min-p", "--repetition-penalty"]
SAMPLING += ["--stop"]


def test_options_are_frozen():
    """A setting of the recipe never becomes an option: --set reaches all of them."""
    options = {}

    def walk(parser, name):
        subparsers = [a for a in parser._actions if isinstance(a.choices, dict)]
        options[name] = [a.option_strings[-1] for a in parser._actions if a.option_strings and a.dest != "help"]
        for action in subparsers:
            for verb, sub in action.choices.items():
                walk(sub, f"{name} {verb}".strip())

    walk(cli.build_parser(), "")
    assert options == {
        "": ["--version"],
        "convert": ["--set", "--dry-run", "--force"],
        "rank-layers": ["--set", "--force"],
        "sweep": ["--set", "--grid", "--keep-models"],
        "generate": ["--prompt", "--chat", "--device", *SAMPLING, "--save-state", "--state"],
        "eval": [
            "--tasks",
            "--include-path",
            "--limit",
            "--num-fewshot",
            "--output",
            "--batch-size",
            "--device",
        ]
        + ["--dtype"],
        "process": ["--name", "--split", "--template", "--chat", "--prefix", "--field", "--batch", "--device"]
        + ["--max-length", "--disable-compile", *SAMPLING],
        "bench": [],
        "bench kernels": [],
        "bench generation": ["--against", "--shape", "--window", "--map-dim", "--prompts", "--new", "--batches"]
        + ["--cells", "--sides", "--steps", "--made-up", "--disable-compile", "--profile"]
        + ["--dtype", "--device", "--output"],
        "bench speculative": ["--against", "--text", "--prompts", "--new", "--lookup", "--dtype", "--device"],
        "report": ["--baseline"],
        "doctor": ["--device"],
        "serve": ["--host", "--port", "--device"],
        "recipes": [],
        "recipes ls": [],
        "recipes show": [],
        "recipes cp": ["--force"],
    }


def test_examples_in_the_help_parse():
    texts = [text for name, text in vars(cli.examples).items() if name.endswith("EPILOG")]
    assert len(texts) > 8
    lines = [line for text in texts for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) > 15
    for line in lines:
        # an explanation stands three spaces or more to the right
        example = line.strip().partition("   ")[0].replace("linearize.cli", "linearize")
        words = shlex.split(example.partition("linearize ")[2])
        assert cli.build_parser().parse_args(words).run, example


# --- verbs -----------------------------------------------------------------------------------------------


def test_convert_hands_on_the_recipe(fake_module, capsys):
    calls = []
    fake_module(
        "linearize.convert",
        convert=lambda recipe, *, force: calls.append((recipe, force)),
        plan=lambda recipe: f"the plan of {recipe.name}",
    )
    assert cli.main(["convert", "quickstart", "--set", "match.tokens=1M", "--set", "match.lr=1e-3", "--force"]) == 0
    ((recipe, force),) = calls
    assert (recipe.name, recipe.match.tokens, recipe.match.lr, force) == ("quickstart", 1_000_000, 1e-3, True)
    assert cli.main(["convert", "a/b", "--dry-run"]) == 0
    assert capsys.readouterr().out == "the plan of b\n"
    assert len(calls) == 1
    assert cli.main(["convert", "a/b"]) == 0
    assert (calls[1][0].model.id, calls[1][1]) == ("a/b", False)


def test_generate_hands_on_its_options(fake_module, monkeypatch):
    calls = []
    fake_module("linearize.generation", generate_text=lambda folder, **options: calls.append((folder, options)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    assert cli.main(["generate", "dir", "-p", "a", "--prompt", "-"]) == 0
    options = dict(max_new_tokens=64, temperature=0.0, top_p=1.0, chat=False, seed=None, device="auto")
    off = dict(top_k=0, min_p=0.0, repetition_penalty=1.0, stop=[], state=None, save_state=None)
    options |= off
    assert calls == [("dir", {"prompts": ["a", "from stdin"], **options})]
    line = "generate d -p x --max-new-tokens 3 --temperature 0.5 --top-p 0.9 --chat --seed 7 --device cpu"
    assert cli.main(line.split()) == 0
    options = dict(max_new_tokens=3, temperature=0.5, top_p=0.9, chat=True, seed=7, device="cpu")
    assert calls[1] == ("d", {"prompts": ["x"], **off, **options})
    line = "generate d -p x --top-k 9 --min-p 0.1 --repetition-penalty 1.2 --stop a --stop b --state s --save-state t"
    assert cli.main(line.split()) == 0
    on = dict(top_k=9, min_p=0.1, repetition_penalty=1.2, stop=["a", "b"], state="s", save_state="t")
    assert calls[2][1].items() >= on.items()


def test_eval_hands_on_its_options_and_writes_json(fake_module, tmp_path, capsys):
    calls = []

    def evaluate_folder(folder, **options):
        calls.append((folder, options))
        return {"acc": 0.5}

    fake_module("linearize_eval.harness", evaluate_folder=evaluate_folder, format_results=lambda r: f"acc {r['acc']}")
    output = tmp_path / "r.json"
    assert cli.main(["eval", "dir", "--tasks", "a, b,", "--limit", "5", "--output", str(output)]) == 0
    options = dict(include_path=None, limit=5, batch_size=8, device="auto", dtype="auto", num_fewshot=None)
    assert calls == [("dir", {"tasks": ["a", "b"], **options})]
    assert capsys.readouterr().out == "acc 0.5\n"
    assert json.loads(output.read_text()) == {"acc": 0.5}
    assert cli.main(["eval", "dir", "--tasks", "a", "--output", str(tmp_path / "no" / "r.json")]) == 2
    assert len(calls) == 1
    assert "create it first" in capsys.readouterr().err


def test_report(fake_module, capsys):
    fake_module("linearize_eval.report", load_report=lambda folder: {"of": folder})
    fake_module("linearize_eval.report_text", print_report=print)
    fake_module("linearize_eval.comparison", print_comparison=print, names_of=lambda folders: [f[-1] for f in folders])
    assert cli.main(["report", "dir"]) == 0
    assert capsys.readouterr().out == "{'of': 'dir'}\n"
    assert cli.main(["report", "dir/a", "dir/b"]) == 0
    assert capsys.readouterr().out == "{'a': {'of': 'dir/a'}, 'b': {'of': 'dir/b'}}\n"


def test_sweep_hands_on_its_grids(fake_module):
    calls = []
    fake_module("linearize_eval.sweep", sweep=lambda source, **options: calls.append((source, options)))
    assert cli.main("sweep my.yaml --grid a.b=1,2 --grid c=3 --set d=4 --keep-models".split()) == 0
    assert cli.main("sweep my.yaml --grid a.b=1".split()) == 0
    assert calls[0] == ("my.yaml", {"grid": ["a.b=1,2", "c=3"], "overrides": ["d=4"], "keep_models": True})
    assert calls[1] == ("my.yaml", {"grid": ["a.b=1"], "overrides": [], "keep_models": False})


def test_recipes(tmp_path, capsys):
    assert cli.main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("quickstart ") and "CPU" in line for line in lines)
    assert cli.main(["recipes", "show", "quickstart"]) == 0
    shown = capsys.readouterr().out
    assert shown == (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    target = tmp_path / "my.yaml"
    assert cli.main(["recipes", "cp", "quickstart", str(target)]) == 0
    assert f"linearize convert {target}" in capsys.readouterr().out
    assert target.read_text(encoding="utf-8") == shown
    assert cli.main(["recipes", "cp", "quickstart", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main(["recipes", "cp", "quickstart", str(target), "--force"]) == 0
    assert cli.main(["recipes", "show", "quikstart"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("linearize.convert:convert", "recipe *force"),
        ("linearize.convert:plan", "recipe"),
        (
            "linearize.generation:generate_text",
            "folder *prompts *max_new_tokens *temperature *top_k *top_p *min_p *repetition_penalty *stop *chat *seed "
            "*device *state *save_state",
        ),
        (
            "linearize_eval.harness:evaluate_folder",
            "folder *tasks *include_path *limit *batch_size *device *dtype *num_fewshot",
        ),
        ("linearize_eval.harness:format_results", "results"),
        ("linearize_eval.report:load_report", "folder"),
        ("linearize_eval.comparison:print_comparison", "reports"),
        ("linearize_eval.comparison:names_of", "folders"),
        ("linearize_eval.sweep:sweep", "source *grid *overrides *keep_models"),
        ("linearize_eval.report_text:print_report", "report"),
    ],
)
def test_the_real_functions_take_what_the_verbs_hand_on(function, arguments):
    module, _, name = function.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    words = arguments.split()
    positional = [word for word in words if not word.startswith("*")]
    signature.bind(*positional, **{word[1:]: None for word in words if word.startswith("*")})


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nope",
        "convert",
        "generate d",
        "eval d",
        "eval d --tasks ,",
        "eval d --tasks a --limit 0",
        "recipes",
        "report",
        "sweep my.yaml",
    ]
    + ["generate d -p x --max-new-tokens 1.5", "eval d --tasks a --batch-size all", "convert x --lr 3"]
    + ["generate d -p x --stop ''", "process d in out --stop ''", "bench speculative d --text x --prompts 0"],
)
def test_wrong_usage_is_status_2(line, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split(line))
    assert caught.value.code == 2
    assert "usage: linearize" in capsys.readouterr().err


def test_a_users_mistake_has_no_traceback(tmp_path):
    result = run("convert", "quickstart", "--set", "match.lrr=1", "--set", "attention.window=0", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ") and lines[0].endswith("quickstart.yaml has 2 problems:")
    assert lines[1:] == [
        "  --set match.lrr: no such setting; did you mean 'match.lr'?",
        "  attention.window (--set): must be at least 1, is 0",
    ]


def test_an_error_from_a_stage_is_printed_the_same_way(fake_module, capsys):
    def convert(recipe, *, force):
        raise DataError("x.txt: is empty")

    fake_module("linearize.convert", convert=convert, plan=None)
    assert cli.main(["convert", "a/b"]) == 2
    assert capsys.readouterr().err == "error: x.txt: is empty\n"


def test_a_bug_of_ours_keeps_its_traceback(fake_module):
    def convert(recipe, *, force):
        raise AssertionError("ours")

    fake_module("linearize.convert", convert=convert, plan=None)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["convert", "a/b"])


def test_interrupted(fake_module, capsys):
    def stop(*args, **options):
        raise KeyboardInterrupt

    fake_module("linearize.convert", convert=stop, plan=stop)
    fake_module("linearize.generation", generate_text=stop)
    assert cli.main(["convert", "a/b"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; give the same command again to resume\n"
    assert cli.main(["generate", "d", "-p", "x"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_reader_that_stops_reading_is_no_error(tmp_path):
    command = [sys.executable, "-m", "linearize.cli", "recipes", "show", "quickstart"]
    env = {**os.environ, "PYTHONPATH": PATH, "PYTHONUNBUFFERED": ""}  # the write fails as late as it can
    reader, writer = os.pipe()
    os.close(reader)  # every write to it fails now
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, "")


def test_doctor_names_versions_and_why_no_kernel_runs_on_a_cpu(capsys):
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in printed
    operations = [line.split(": ")[:2] for line in printed.splitlines()[3:]]
    assert {name.split(",")[0] for name, _ in operations} == {
        "training attention", "training backward", "prefill", "decode with its maps", "losses of logits"
    }  # fmt: skip
    taken = {name: rest.split(" (")[0] for name, rest in operations}
    assert taken["training attention, bfloat16"] == taken["prefill, float32"] == "reference"
    assert taken["losses of logits, bfloat16"] == "reference"


def test_doctor_says_what_may_be_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("LINEARIZE_KERNELS", "fast")
    assert cli.main(["doctor", "--device", "cpu"]) == 2
    assert "LINEARIZE_KERNELS='fast': choose one of auto, reference, triton, cuda" in capsys.readouterr().err
