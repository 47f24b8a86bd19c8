"""`linearize generate`: text from an exported folder, alone and in batches, chat, sampling, and what is refused."""

import io
import shutil

import pytest
import torch
from pico import randomise
from test_export import CHAT, make_tokenizer, save_model
from tokenizers import normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize import cli
from linearize.architecture import linearize_
from linearize.errors import LinearizeError, ModelError
from linearize.export import export
from linearize.generation import _encode, generate_text
from linearize.loading import load
from linearize.recipe import AttentionSettings, FeatureMapSettings

PROMPTS = ["the old king", "a river runs to the town and the red", "so"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def folder(teacher):
    """A converted model, not trained, with a chat template."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    linearize_(model, AttentionSettings(window=6, sinks=2, feature_map=FeatureMapSettings(dim=4)))
    randomise(model)
    export(model, make_tokenizer(chat_template=CHAT), teacher.parent / "out", dtype="auto", files={})
    return teacher.parent / "out"


def continued(folder, prompt: str, *, num_tokens: int) -> str:
    """Greedy decoding by one forward of the whole text a token."""
    model, tokenizer = load(folder, device="cpu")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_greedy_text_is_the_models_own_alone_and_in_a_batch(folder, capsys):
    texts = generate_text(folder, prompts=PROMPTS, max_new_tokens=20, device="cpu")
    printed = capsys.readouterr().out
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text == continued(folder, prompt, num_tokens=20)
        assert f"{prompt}{text}\n" in printed
        assert generate_text(folder, prompts=[prompt], max_new_tokens=20, device="cpu") == [text]
        assert capsys.readouterr().out == f"{prompt}{text}\n", "streamed, with its prompt"


def test_samples_repeat_with_a_seed(folder):
    options = {"prompts": PROMPTS[:1], "max_new_tokens": 20, "temperature": 1.5, "device": "cpu"}
    first, again, other = (generate_text(folder, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    greedy = generate_text(folder, seed=3, **{**options, "temperature": 0.0})
    assert greedy == [continued(folder, PROMPTS[0], num_tokens=20)]
    assert generate_text(folder, seed=3, top_p=1e-6, **options) == greedy, "of one token, there is no choice"


def test_chat_goes_through_the_template_and_prints_the_answer_alone(folder, capsys):
    texts = generate_text(folder, prompts=PROMPTS, chat=True, max_new_tokens=8, device="cpu")
    capsys.readouterr()
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text == continued(folder, f"<s>user: {prompt}</s><s>", num_tokens=8)
    answer = generate_text(folder, prompts=PROMPTS[:1], chat=True, max_new_tokens=8, device="cpu")
    assert answer == texts[:1] and capsys.readouterr().out == f"{answer[0]}\n"


def test_a_tokenizer_without_a_pad_token_will_do(folder, tmp_path):
    model, _ = load(folder, device="cpu")
    export(model, make_tokenizer(pad=None), tmp_path / "out", dtype="auto", files={})
    expected = generate_text(folder, prompts=PROMPTS, max_new_tokens=8, device="cpu")
    assert generate_text(tmp_path / "out", prompts=PROMPTS, max_new_tokens=8, device="cpu") == expected


def test_the_command_line_reads_standard_input(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[0]))
    assert cli.main(["generate", str(folder), "-p", "-", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{PROMPTS[0]}{continued(folder, PROMPTS[0], num_tokens=5)}\n"


def test_a_text_is_read_once_and_questioned_often(folder, tmp_path, capsys):
    file, book, questions = tmp_path / "book.state", "the old king " * 5, ["sees", "gives a red town"]
    run = lambda *words: cli.main(["generate", str(folder), "--device", "cpu", *map(str, words)])  # noqa: E731
    assert run("-p", book, "--save-state", file) == 0
    assert f"{file}: 65 tokens, " in capsys.readouterr().out
    told = ["--state", file, "--max-new-tokens", 9]
    for asked in ([questions[0]], questions):
        assert run(*[x for q in asked for x in ("-p", q)], *told) == 0
        printed = capsys.readouterr().out
        for question in asked:
            assert f"{question}{continued(folder, book + question, num_tokens=9)}\n" in printed
    assert run("-p", questions[0], "--state", file, "--save-state", tmp_path / "more.state") == 0
    assert "more.state: 69 tokens" in capsys.readouterr().out
    assert "the state of one text" in refused(capsys, "generate", folder, "-p", "a", "-p", "b", "--save-state", "x")
    assert "is not a saved state" in refused(capsys, "generate", folder, "-p", "a", "--state", tmp_path / "none")
    missing = tmp_path / "none" / "a.state"
    assert "create it first" in refused(capsys, "generate", tmp_path, "-p", "a", "--save-state", missing), "at once"


def test_a_text_longer_than_the_models_positions_is_told(folder, capsys):
    run = lambda text: cli.main(["generate", str(folder), "-p", text, "--max-new-tokens", "3", "--device", "cpu"])  # noqa: E731
    assert run("a" * 509) == 0 and "warning" not in capsys.readouterr().err
    assert run("a" * 510) == 0 and "510 tokens and 3 new ones are more than the 512" in capsys.readouterr().err


def test_a_text_that_follows_another_begins_without_a_special_token():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    alone, after = (_encode(tokenizer, ["so"], False, follows=follows)["input_ids"][0].tolist() for follows in (0, 1))
    assert alone == [0, *after] and len(after) == 2


def test_stop_texts_end_an_answer(folder, capsys):
    text = continued(folder, PROMPTS[0], num_tokens=20)
    stop = text[5:7]
    got = generate_text(folder, prompts=PROMPTS[:1], max_new_tokens=20, stop=[stop], device="cpu")[0]
    assert got == text[: text.index(stop) + 2] != text


def refused(capsys, *words) -> str:
    assert cli.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err and "Traceback" not in captured.err and captured.out == ""
    return captured.err


def test_what_cannot_be_generated(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for prompt in ("", "-"):
        assert "a prompt is empty" in refused(capsys, "generate", folder, "-p", "some text", "-p", prompt)
    for option, value in (("--temperature", -1), ("--top-p", 0), ("--top-p", 1.5)):
        assert f"{option[2:]} must be" in refused(capsys, "generate", folder, "-p", "text", option, value)
    assert "64 bits" in refused(capsys, "generate", folder, "-p", "text", "--seed", 2**63)
    assert "not UTF-8" in refused(capsys, "generate", folder, "-p", "text", "-p", "K\udcf6nig")  # of Latin-1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"K\xf6nig"), encoding="utf-8"))
    assert "standard input is no text" in refused(capsys, "generate", folder, "-p", "-")
    (tmp_path / "a.state").mkdir()
    assert "cannot be written" in refused(capsys, "generate", folder, "-p", "a", "--save-state", tmp_path / "a.state")
    with pytest.raises(LinearizeError, match="a prompt is empty"):
        generate_text(folder, prompts=[])


def test_devices_that_are_not_there(folder, capsys, monkeypatch):
    def said(device):
        return refused(capsys, "generate", folder, "-p", "text", "--device", device)

    assert "Expected one of" in said("abacus")
    for device in ("hip", "hpu", "vulkan"):
        assert f"device '{device}' is not on this machine" in said(device)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees no CUDA device" in said("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "sees only 2 CUDA devices" in said("cuda:2")


def test_text_that_the_tokenizer_makes_nothing_of(folder, tmp_path, capsys):
    model, tokenizer = load(folder, device="cpu")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    export(model, tokenizer, tmp_path / "out", dtype="auto", files={})
    for prompts in (["-p", "  "], ["-p", "  ", "-p", "text"]):
        assert "a prompt is empty for this tokenizer" in refused(capsys, "generate", tmp_path / "out", *prompts)


def test_folders_that_are_not_converted(folder, teacher, tmp_path, capsys):
    said = refused(capsys, "generate", teacher, "-p", "text")
    assert f"holds a llama model, not a converted one. Convert it first: linearize convert {teacher}" in said
    for verb in (["generate", "-p", "text"], ["eval", "--tasks", "piqa"]):
        said = refused(capsys, *verb[:1], tmp_path, *verb[1:])
        assert "it has no config.json" in said and "linearize convert" in said
    assert "linearize convert" in refused(capsys, "report", teacher)
    with pytest.raises(ModelError, match="has no config.json"):
        load(tmp_path / "nowhere")


def test_chat_without_a_template(folder, tmp_path, capsys):
    model, _ = load(folder, device="cpu")
    export(model, make_tokenizer(), tmp_path / "out", dtype="auto", files={})
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"text": "hi"}\n')
    out = tmp_path / "out"
    for words in (("generate", out, "-p", "hi"), ("process", out, rows, tmp_path / "answers")):
        assert "no chat template; leave --chat out" in refused(capsys, *words, "--chat", "--device", "cpu")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_folders_that_are_damaged(folder, tmp_path, capsys):
    for file, word in (("model.safetensors", "does not load"), ("config.json", "is not valid JSON")):
        damaged = tmp_path / file
        shutil.copytree(folder, damaged)
        (damaged / file).write_bytes(b"12345678 damaged")
        assert word in refused(capsys, "generate", damaged, "-p", "text")
        with pytest.raises(ModelError, match=word):
            load(damaged, device="cpu")
