"""`linearize serve`: a real OpenAI client over loopback gets the model's own greedy text, whole and streamed."""

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from pico import randomise
from test_export import CHAT, make_tokenizer, save_model
from transformers import AutoModelForCausalLM, GenerationConfig

from linearize import cli
from linearize.architecture import linearize_
from linearize.errors import LinearizeError
from linearize.export import export
from linearize.generation import generate_text
from linearize.recipe import AttentionSettings, FeatureMapSettings
from linearize.serve import serve

PROMPT = "a river runs to the town and the red"
MISSING = [name for name in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
needs_server = pytest.mark.skipif(bool(MISSING), reason=f'needs pip install ".[serve]" ({", ".join(MISSING)})')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model, not trained, that answers greedily."""
    path = tmp_path_factory.mktemp("serve")
    model = AutoModelForCausalLM.from_pretrained(save_model(path / "teacher"))
    linearize_(model, AttentionSettings(window=6, sinks=2, feature_map=FeatureMapSettings(dim=4)))
    randomise(model)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    export(model, make_tokenizer(chat_template=CHAT), path / "out", dtype="auto", files={})
    return path / "out"


@pytest.fixture(scope="module")
def client(folder):
    """An OpenAI client of a server in a process of its own."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "linearize.cli", "serve", str(folder), "--host", "127.0.0.1", "--device", "cpu"]
    process = subprocess.Popen([*command, "--port", str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address, process, *, seconds=120):
    for _ in range(10 * seconds):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError("no answer from the server")


@pytest.mark.slow
@needs_server
def test_chat_whole_and_streamed(client, folder, capsys):
    expected = generate_text(folder, prompts=[PROMPT], chat=True, max_new_tokens=30, device="cpu")[0]
    ask = dict(model=str(folder), messages=[{"role": "user", "content": PROMPT}], max_tokens=30, temperature=0)
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].message.content == expected != ""
    assert answer.usage.completion_tokens == 30
    pieces = [c.choices[0].delta.content for c in client.chat.completions.create(**ask, stream=True) if c.choices]
    assert "".join(p for p in pieces if p) == expected.rstrip("\ufffd"), "but for a last half character"
    assert len([p for p in pieces if p]) > 5, "in pieces, as they come"


@pytest.mark.slow
@needs_server
def test_a_temperature_and_a_seed(client, folder):
    ask = dict(model=str(folder), messages=[{"role": "user", "content": PROMPT}], max_tokens=30, temperature=1.0)
    first, again, other = (
        client.chat.completions.create(**ask, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.slow
@needs_server
def test_completions_models_and_a_reset(client, folder, capsys):
    expected = generate_text(folder, prompts=[PROMPT], max_new_tokens=20, device="cpu")[0]
    ask = dict(model=str(folder), prompt=PROMPT, max_tokens=20, temperature=0)
    assert client.completions.create(**ask).choices[0].text == expected != ""
    assert [model.id for model in client.models.list()] == [str(folder)]
    client.post("../reset", cast_to=object)  # transformers' own way to free memory
    pieces = [c.choices[0].text for c in client.completions.create(**ask, stream=True) if c.choices]
    assert "".join(pieces) == expected.rstrip("\ufffd")


@pytest.mark.slow
@needs_server
def test_another_model_is_refused(client):
    import openai

    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="another", prompt=PROMPT, max_tokens=2)


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_ports(port, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "anything", "--port", port])
    assert "argument --port: must be" in capsys.readouterr().err


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(LinearizeError, match=r"linearize\[serve\]"):
        serve("anything")
