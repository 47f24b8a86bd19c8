"""A GGUF file is unpacked once: what is kept gives the same model, and only for that file."""

import os

import numpy as np
import pytest
import torch

from linearize import gguf_cache, loading
from linearize.recipe import ModelSettings

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
CPU = torch.device("cpu")
HIDDEN, INNER, HEADS, WORDS = 32, 64, 2, [*map(chr, range(33, 97)), "!!", '""']


def save_gguf(path, seed=0):
    """A Llama of one layer with random weights, whose tokens are characters."""
    draw, writer = np.random.default_rng(seed), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_merges(["! !", '" "'])  # more than one: transformers takes a list of one for its item
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    square, up, down = (HIDDEN, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    layer = {"attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square, "ffn_gate": up, "ffn_up": up}
    layer |= {"ffn_down": down, "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    shapes = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    return save_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def reads(monkeypatch):
    """What was loaded: the GGUF file's name, or None for a folder."""
    seen, load = [], loading._load_pretrained
    monkeypatch.setattr(loading, "_load_pretrained", lambda source, *a: seen.append(source.gguf) or load(source, *a))
    return seen


def results(file, dtype="auto"):
    """Logits and tokens, for comparison bit by bit."""
    model, tokenizer = loading.load_teacher(ModelSettings(id=str(file), dtype=dtype), device=CPU)
    ids = tokenizer("AB!!C", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits, ids.tolist(), tokenizer.backend_tokenizer.to_str(), model.dtype


def same(a, b) -> bool:
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def test_a_file_is_read_once_and_gives_the_same_model(file, reads, monkeypatch):
    first = results(file)
    assert reads == ["tiny.gguf", None] and same(first, results(file)) and reads[2:] == [None]
    monkeypatch.setattr(gguf_cache, "LARGEST", 0)
    assert same(first, results(file)) and reads[3:] == ["tiny.gguf"]  # as transformers reads it, nothing kept
    assert first[0].isfinite().all() and len(first[1][0]) >= 4


def test_another_file_or_dtype_is_another_model(file, reads):
    first = results(file)
    in_bfloat16 = results(file, "bfloat16")
    assert in_bfloat16[-1] == torch.bfloat16 and reads == ["tiny.gguf", None] * 2
    save_gguf(file, seed=1)
    os.utime(file, (1, 1))  # whatever the clock's steps are
    assert not same(first, results(file)) and reads[4:] == ["tiny.gguf", None]


def test_a_damaged_folder_is_made_again(file, reads):
    first = results(file)
    weights = gguf_cache.kept_folder(file, torch.float32) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="does not load .* it is made again"):
        assert same(first, results(file))
    assert reads == ["tiny.gguf", None, None, "tiny.gguf", None] and same(first, results(file))


def test_where_nothing_can_be_kept_it_loads_with_a_warning(file, reads, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.warns(UserWarning, match="set LINEARIZE_CACHE"):
        results(file)
    assert reads == ["tiny.gguf"]
