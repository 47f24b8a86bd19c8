"""The kernels' benchmark as a command, from its arguments to its files, on a CPU: tiny shapes, Triton's interpreter.

Clocks and ceilings are made up, dtypes float32 (the interpreter has no bfloat16 products); fla is its definition under
its own names. What is checked, counted, compared, written and drawn is the benchmark's own.
"""

import csv
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import bench, bench_chart, bench_decode, bench_measure, bench_peers, bench_shapes  # noqa: E402
from linearize_kernels.bench_measure import Ceilings  # noqa: E402
from linearize_kernels.bench_shapes import Shape, exact_taylor  # noqa: E402
from linearize_kernels.feature_maps import Taylor  # noqa: E402

TINY = {"tiny": Shape("tiny", H=2, G=1, D=16), "alike": Shape("alike", H=2, G=2, D=16)}
COMMON = ["--shapes", "tiny,alike", "--lengths", "48", "--tokens", "96", "--batches", "1,2", "--window", "9",
          "--map-dim", "4", "--compile-seconds", "0"]  # fmt: skip
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the command itself")


def fake_fla() -> dict[str, ModuleType]:
    """What the benchmark imports of fla, by definition: 1 + x + x²/2, x = scale q·k, for [B, T, H, size]."""

    def based(q, k, v, scale, use_norm):
        assert use_norm
        q, k, v = (x.transpose(1, 2) for x in (q * scale * q.shape[-1] ** 0.5, k, v))
        return exact_taylor(q, k, v).to(v.dtype).transpose(1, 2)

    def chunk_linear_attn(q, k, v, scale, normalize):
        assert normalize and q.shape[-1] % 16 == 0
        q, k, v = (x.transpose(1, 2) for x in (q * scale, k, v))
        weights = (q @ k.mT).tril()
        return (weights @ v / weights.sum(-1, keepdim=True)).transpose(1, 2), None

    class TaylorFeatureMap:
        """Of q / head_dim^(1/4), as fla's own: products are those of q·k / sqrt(head_dim)."""

        def __init__(self, head_dim):
            self.shrink = head_dim**-0.25

        def __call__(self, x):
            return Taylor.expand(x * self.shrink)

    names = ("fla", "fla.ops", "fla.ops.based", "fla.ops.linear_attn", "fla.modules", "fla.modules.feature_map")
    modules = {name: ModuleType(name) for name in names}
    modules["fla.ops"].based = modules["fla.ops.based"]
    modules["fla.ops.based"].parallel_based = modules["fla.ops.based"].fused_chunk_based = based
    modules["fla.ops.linear_attn"].chunk_linear_attn = chunk_linear_attn
    modules["fla.modules.feature_map"].TaylorFeatureMap = TaylorFeatureMap
    return modules


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU in a GPU's place, and where the files go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a CPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 0)
    monkeypatch.setattr(bench_measure, "require_gpu", lambda note: None)
    monkeypatch.setattr(bench, "measure_ceilings", lambda rep: Ceilings(copy=1000.0, product=100.0))
    for name, module in fake_fla().items():
        monkeypatch.setitem(sys.modules, name, module)
    about = bench.about
    monkeypatch.setattr(bench, "about", lambda: {**about(), "fla": "by definition"})

    def draw(s, device="cpu", dtype=torch.float32, original=bench_shapes.draw):
        return original(s, device=device, dtype=dtype)

    def measure(function, *, rep):
        function()
        return 0.5, 1.0

    def measure_graph(call, calls, **_):
        call(0)
        return 0.5, 1.0

    for module in (bench, bench_decode, bench_peers):
        monkeypatch.setattr(module, "draw", draw)
        if hasattr(module, "measure"):
            monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(bench_decode, "measure_graph", measure_graph)
    for module in (bench, bench_chart, bench_shapes):
        monkeypatch.setattr(module, "SHAPES", TINY)
    monkeypatch.setattr(bench_peers, "REFERENCE_LENGTH", 48)
    return tmp_path / "out"


def run(output, *arguments) -> list[dict]:
    bench.main([*COMMON, *arguments, "--output", str(output)])
    return read(output)


def read(output) -> list[dict]:
    with open(output.with_suffix(".csv"), newline="") as file:
        return list(csv.DictReader(file))


OF_ONE_RUN = {"gpu": "a CPU", "torch": torch.__version__, "fla": "by definition", "window": "9", "sinks": "4",
              "map_dim": "4", "copy_gb_per_s": "1000.0", "product_tflops": "100.0"}  # fmt: skip
LABELS = {"softmax, SDPA cuDNN", "softmax, SDPA flash", "fla parallel_based", "fla fused_chunk_based",
          "fla chunk_linear_attn + features", "reference, chunked"}  # fmt: skip


def test_prefill_and_training_beside_every_peer(machine, capsys):
    rows, printed = run(machine, "--only", "prefill,training"), capsys.readouterr().out
    for operation, ours in (("prefill", "prefill"), ("forward", "training"), ("forward + backward", "training")):
        for shape in TINY:
            group = [row for row in rows if (row["operation"], row["shape"]) == (operation, shape)]
            alone = {"  its kernels alone", "  its features alone"} if operation == "prefill" else set()
            assert {row["implementation"] for row in group} == {f"linearize {ours}", *LABELS, *alone}
            for row in group:
                assert row.items() >= OF_ONE_RUN.items()
                if "cuDNN" in row["implementation"]:
                    assert row["note"].startswith("RuntimeError") and row["ms"] == "", "no CPU has it"
                    continue
                assert (row["note"], row["ms_min"], row["ms"]) == ("", "0.5", "1.0")
                assert row["implementation"] in alone or float(row["error"]) < 1e-6
                assert float(row["times_fla"]) == 1 and row["times_cudnn"] == ""
    assert rows[0]["layer"] == "2 heads on 1, D 16" and "-- prefill, tiny (2 heads on 1, D 16), 2 x 48:" in printed
    assert "a CPU, torch" in printed and "window 9, sinks 4, map dim 4" in printed and "copy 1000 GB/s" in printed
    assert machine.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_decoding(machine, monkeypatch, fold_early):
    """What a CPU cannot decode by ends the command with an error; the others have their rows."""
    monkeypatch.setattr(bench_decode, "REFERENCE_ROWS", 2)
    monkeypatch.setattr(bench_decode, "CHECKED", 12)
    monkeypatch.setattr(bench_decode, "WORKING_SET", 2**16)  # no cache to be beyond
    with pytest.raises(SystemExit, match="rows of our kernels failed"):
        run(machine, "--only", "decode", "--shapes", "tiny")
    rows = read(machine)
    for batch in ("1", "2"):
        found = {row["implementation"]: row for row in rows if row["B"] == batch}
        assert ("reference" in found) == (batch == "2")
        ours = found["linearize decode, float32 sum"]
        assert float(ours["error"]) < 1e-5 and ours["ms"] == "1.0" and ours["note"] == ""
        assert "asked to run in CUDA, and cannot" in found["linearize decode, CUDA, float32 sum"]["note"]
        assert {f"softmax over {n}, SDPA {name}" for n in (2048, 8192) for name in ("cuDNN", "flash")} < set(found)


def test_a_wrong_kernel_of_ours_ends_the_command_with_an_error(machine, monkeypatch, capsys):
    from linearize_kernels import prefill

    right = prefill.attention_prefill

    def wrong(*args, **kw):
        out, state = right(*args, **kw)
        return out * 1.01, state

    monkeypatch.setattr(prefill, "attention_prefill", wrong)
    with pytest.raises(SystemExit, match="2 rows of our kernels failed or were wrong"):
        run(machine, "--only", "prefill", "--peers", "sdpa_flash")
    assert "(1.0000)" in capsys.readouterr().out
    assert [row["note"] for row in read(machine) if row["role"] == "ours"] == ["WRONG"] * 2


def test_a_peer_that_is_not_there_is_said(machine, monkeypatch, capsys):
    about = bench.about
    monkeypatch.setattr(bench, "about", lambda: {**about(), "fla": "not installed"})
    rows = run(machine, "--only", "prefill", "--shapes", "tiny")
    assert not [row for row in rows if "fla " in row["implementation"]]
    assert "fla's kernels: not installed (pip install flash-linear-attention)" in capsys.readouterr().out
