"""`linearize convert` from end to end: killed and resumed, on several processes, with bad input, and the plan.

Also the tiny model, text and recipe that the tests of the stages and of the export start from.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from linearize import cli, convert, errors, plan, shipped
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import load_recipe
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")])
SPECIAL = ["<s>", "</s>", "<pad>"]
WORDS = "the a one old new king town river runs sees takes gives red blue slow to from and of in".split()
CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def make_tokenizer(*, pad="<pad>", chat_template=None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, 259 in all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad)
    fast.chat_template = chat_template
    return fast


def save_model(folder: Path, *, model_type="llama", layers=2, dtype=torch.float32, pad="<pad>", chat_template=None,
               **settings) -> Path:  # fmt: skip
    """A random model of width 32 with its tokenizer, attention sharp enough that the far term matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{
            "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 2, **settings,
        }
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, temperature=0.7
    )
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(pad=pad, chat_template=chat_template).save_pretrained(folder)
    return folder


def save_text(path: Path, *, documents=60, words=40) -> Path:
    """Documents of random sentences, one a line of JSON."""
    choose = random.Random(0)
    lines = [json.dumps({"text": " ".join(choose.choices(WORDS, k=words))}) for _ in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_recipe(folder: Path, model, text, **changes) -> Path:
    """recipe.yaml: 8 steps of matching and 8 of finetuning, no report card."""
    settings = {
        "model.id": str(model), "attention.window": 8, "attention.sinks": 2, "attention.feature_map.dim": 4,
        "data.source": str(text), "data.sequence_length": 48, "data.held_out": 4, "calibrate.sequences": 2,
        "run.checkpoint_every": 3, "run.device": "cpu", "evaluate.sequences": 0, "output.folder": str(folder / "out"),
    }  # fmt: skip
    for stage in ("match", "finetune"):
        settings |= {f"{stage}.tokens": 1536, f"{stage}.batch_tokens": 192, f"{stage}.evaluate_every": 2}
    sections: dict = {}
    for name, value in {**settings, **changes}.items():
        *path, last = name.split(".")
        section = sections
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(sections), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def environment(**more) -> dict:
    return {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(recipe, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", "linearize.cli", "convert", str(recipe), *options]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_log(path: Path) -> list[dict]:
    """Records of a log, the line that is being written left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def steps_of(path: Path) -> dict[tuple, set]:
    """(stage, step) -> the different (loss, gradient norm, layers) that were logged for it."""
    steps: dict[tuple, set] = {}
    for record in read_log(path):
        if "grad_norm" in record:
            figures = (record["loss"], record["grad_norm"], *record.get("layers", ()))
            steps.setdefault((record["stage"], record["step"]), set()).add(figures)
    return steps


def kill_at(recipe, stage: str, step: int) -> None:
    """Runs the recipe until the log shows this step, and kills it there."""
    log = recipe.parent / "out.work" / "log.jsonl"
    process, deadline = start(recipe), time.monotonic() + 120
    while (stage, step) not in steps_of(log):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not any(r.get("done") and r["stage"] == stage for r in read_log(log)), "killed too late to tell anything"


# ------------------------------------------------------------------------------------------- resume, processes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, model, text):
    """The output folder of a run that nothing disturbed, in this process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return convert.convert(load_recipe(save_recipe(folder, model, text, **DROPOUT)))


DROPOUT = {"finetune.lora.dropout": 0.1, "finetune.loss.kl": 1.0}  # random numbers must resume too


def test_killed_in_each_stage_and_resumed_the_run_is_the_same(tmp_path, model, text, uninterrupted):
    recipe = save_recipe(tmp_path, model, text, **DROPOUT)
    kill_at(recipe, "match", 5)
    assert not (tmp_path / "out").exists()
    kill_at(recipe, "finetune", 5)
    assert not (tmp_path / "out").exists()
    process = start(recipe)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "match: done before" in output and "finetune: going on after step 3" in output
    expected, resumed = steps_of(uninterrupted / "log.jsonl"), steps_of(tmp_path / "out" / "log.jsonl")
    assert len(expected) == 16 and resumed == expected, "every loss, also of steps that were done twice, is the same"
    assert [s for s in expected.values() if len(s) != 1] == []
    weights, again = (load_file(f / "model.safetensors") for f in (uninterrupted, tmp_path / "out"))
    assert weights.keys() == again.keys() and all(torch.equal(weights[n], again[n]) for n in weights)
    assert not (tmp_path / "out.work").exists()


def test_a_finished_folder_is_kept_unless_forced(uninterrupted, tmp_path, capsys):
    recipe, before = uninterrupted.parent / "recipe.yaml", (uninterrupted / "log.jsonl").stat()
    assert cli.main(["convert", str(recipe)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (uninterrupted / "log.jsonl").stat() == before


@pytest.mark.parametrize("num_processes", [2])
def test_processes_give_the_losses_of_one(tmp_path, model, text, uninterrupted, num_processes):
    changes = {"finetune.loss.kl": 1.0, "run.micro_batch": 2}
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
    convert.convert(load_recipe(save_recipe(one, model, text, **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    command += ["--master_port", str(port), "-m", "linearize.cli", "convert", str(save_recipe(several, model, text, **changes))]
    result = subprocess.run(
        command, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    expected, actual = steps_of(one / "out" / "log.jsonl"), steps_of(several / "out" / "log.jsonl")
    assert expected.keys() == actual.keys()
    for step in expected:
        (a,), (b,) = expected[step], actual[step]
        assert a == pytest.approx(b, rel=1e-5, abs=2e-6), step
    names = [sorted(p.name for p in (f / "out").iterdir()) for f in (one, several)]
    assert names[0] == names[1]
    weights, again = (load_file(f / "out" / "model.safetensors") for f in (one, several))
    for name in weights:
        torch.testing.assert_close(weights[name], again[name], rtol=1e-3, atol=1e-4)
    assert not (several / "out.work").exists()
