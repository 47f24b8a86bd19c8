"""What is kept on disk between processes: used only whole and only for what it was made of."""

import warnings

import pytest

from linearize_kernels import cuda, disk_cache

OPTIONS = ("sums.cu", {"SIZE": 64}, "sm_90a")
SOURCE = '#include "part.cuh"\nextern "C" __global__ void sums(float* x) { x[threadIdx.x] = part(SIZE); }\n'


def why_no_compiler() -> str:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # no bindings; bindings without their library
        return f"NVRTC is not here: {type(error).__name__}"
    return ""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Sources in a folder of their own and an empty cache; gives the list of what was compiled."""
    (tmp_path / "sums.cu").write_text(SOURCE)
    (tmp_path / "part.cuh").write_text("__device__ float part(int i) { return i; }\n")
    monkeypatch.setattr(cuda, "HERE", tmp_path)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    calls = []
    compile_source = cuda.compile_source
    monkeypatch.setattr(cuda, "compile_source", lambda *a, **k: calls.append(a) or compile_source(*a, **k))
    return calls


@pytest.fixture
def no_compiler(made, monkeypatch):
    """As `made`, where machine code is the number of compilations so far."""
    monkeypatch.setattr(cuda, "compile_source", lambda *a, **_: made.append(a) or str(len(made)).encode())
    monkeypatch.setattr(cuda, "_checked", lambda *_: (13, 0))
    return made


@pytest.mark.skipif(bool(why_no_compiler()), reason=why_no_compiler())
def test_a_source_is_compiled_once(made):
    first = cuda.compiled(*OPTIONS)
    assert first.startswith(b"\x7fELF") and cuda.compiled(*OPTIONS) == first and len(made) == 1
    with pytest.raises(cuda.CudaError, match="sums.cu does not compile"):
        cuda.compiled("sums.cu", {"SIZE": "?"}, "sm_90a")


@pytest.mark.parametrize("change", ["the source", "what it includes", "defines", "architecture", "NVRTC"])
def test_whatever_decides_the_code_makes_it_anew(change, no_compiler, monkeypatch):
    assert cuda.compiled(*OPTIONS) == cuda.compiled(*OPTIONS) == b"1"
    file, defines, arch = OPTIONS
    for name, path in {"the source": file, "what it includes": "part.cuh"}.items():
        if name == change:
            (cuda.HERE / path).write_text((cuda.HERE / path).read_text() + "// changed\n")
    if change == "NVRTC":
        monkeypatch.setattr(cuda, "_checked", lambda *_: (13, 1))
    options = (file, {"SIZE": 65} if change == "defines" else defines, "sm_100a" if change == "architecture" else arch)
    assert cuda.compiled(*options) == cuda.compiled(*options) == b"2"


DAMAGE = [lambda b: b[:-1], lambda b: b[:-1] + b"!", lambda b: b"", lambda b: b[:40] + b[41:]]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut", "changed", "empty", "a byte lost"])
def test_a_damaged_file_is_made_again(damage, tmp_path):
    path, content = tmp_path / "sub" / "file", bytes(range(64))
    assert disk_cache.kept(path, lambda: content) == content
    path.write_bytes(damage(path.read_bytes()))
    assert disk_cache.kept(path, lambda: content) == content
    assert disk_cache.kept(path, pytest.fail) == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_means_one_warning(tmp_path):
    (tmp_path / "no_folder").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for name in ("a", "b"):
            assert disk_cache.kept(tmp_path / "no_folder" / name, lambda: b"made") == b"made"
    (warning,) = caught
    assert "set LINEARIZE_CACHE" in str(warning.message) and "\n" not in str(warning.message)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("LINEARIZE_CACHE", "/mine")
    assert str(disk_cache.cache_folder()) == "/mine"
    monkeypatch.delenv("LINEARIZE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(disk_cache.cache_folder()) == "/caches/linearize"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert str(disk_cache.cache_folder()) == "/home/user/.cache/linearize"
