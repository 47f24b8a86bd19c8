"""Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported.

Under `pytest -n`, each process keeps to one thread: they share the cores already.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is kept on disk between processes is this session's own."""
    os.environ["LINEARIZE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def fold_early(monkeypatch):
    """In the interpreter, which is slow, decoding folds 8 tokens at once instead of 32."""
    fold_early_by(monkeypatch)


def fold_early_by(monkeypatch):
    if not torch.cuda.is_available():
        tl = pytest.importorskip("triton.language", reason="Triton is not installed")
        monkeypatch.setattr("linearize_kernels.decode.FOLD", 8)
        monkeypatch.setattr("linearize_kernels.decode_kernels.FOLD", tl.constexpr(8))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model, to be converted."""
    from test_export import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of text to train it on."""
    from test_export import save_text

    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")
