"""The kernels' benchmark: its counts, definitions, ratios, files and error paths on a CPU; a small run on a GPU."""

import csv
import itertools
import time

import pytest
import torch
from pico import relative_error

from linearize_kernels import attention_quadratic

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import bench, bench_launches  # noqa: E402
from linearize_kernels.bench_chart import derive, draw_chart, groups, panels_of, table, write_csv  # noqa: E402
from linearize_kernels.bench_decode import decode_cost  # noqa: E402
from linearize_kernels.bench_measure import (  # noqa: E402
    Ceilings,
    Row,
    attempt,
    measure,
    measure_graph,
    poison,
    relative,
    require_finite,
)
from linearize_kernels.bench_peers import PEERS, candidates  # noqa: E402
from linearize_kernels.bench_shapes import (  # noqa: E402
    SHAPES,
    Shape,
    draw,
    exact_hybrid,
    exact_pairs,
    exact_softmax,
    exact_taylor,
    hybrid_cost,
    softmax_cost,
    taylor_cost,
)

CEILINGS = Ceilings(copy=1000.0, product=100.0)
TINY = Shape("tiny", H=4, G=2, D=16, B=2, T=24, d=4, window=5, sinks=2)


def make_row(implementation, ms, *, role="", operation="prefill", T=4096, note="", gflop=50.0, gb=2.0) -> Row:
    return Row(operation, "based", 16, T, implementation, role, 1e-3, ms, ms, gflop, gb, 4.0, note)


def make_rows(**changes) -> list[Row]:
    return [
        make_row("linearize prefill", 8.0, role="ours", **changes),
        make_row("softmax, SDPA cuDNN", 16.0, role="cudnn", **changes),
        make_row("fla a", 40.0, role="fla", **changes),
        make_row("fla b", 24.0, role="fla", **changes),
        make_row("fla wrong", 1.0, role="fla", **{**changes, "note": "WRONG"}),
        make_row("fla late", None, role="fla", **{**changes, "note": "timed out after 40 s"}),
    ]


@pytest.mark.parametrize("length", [1, 6, 7, 8, 40])
def test_exact_pairs_are_those_of_the_definition(length):
    count = sum(i - j < TINY.window or j < TINY.sinks for i in range(length) for j in range(i + 1))  # j is visible to i
    s = TINY._replace(T=length)
    assert exact_pairs(s) == s.B * s.H * count


def test_counts_of_a_long_call_by_hand():
    s = Shape("one", H=2, G=1, D=64, B=1, T=1000, d=16)
    assert s.features == 153
    exact = 2 * (1000 * 68 - 68 * 67 / 2)
    far, product = 1000 - 68, 2 * 153 * 64
    assert hybrid_cost(s, backward=False).gflop == pytest.approx((exact * 256 + far * (2 + 1) * product) / 1e9)
    queries, keys = 2 * far * 2 * product, far * 3 * product
    backward = (exact * 640 + queries + keys) / 1e9
    assert hybrid_cost(s, backward=True).gflop == pytest.approx(hybrid_cost(s, backward=False).gflop + backward)
    token = 2 * (2 * 64 + 2 * 64 + 2 * 16 + 16) + 2 * 4  # q, k, v, maps; gate
    assert hybrid_cost(s, backward=False).gb == pytest.approx(1000 * (token + 2 * 64 * 2) / 1e9)
    assert hybrid_cost(s, backward=True).gb == pytest.approx(3 * hybrid_cost(s, backward=False).gb)


def test_bytes_are_those_of_the_tensors_drawn():
    inputs, grad = draw(TINY, device="cpu")
    total = sum(x.numel() * x.element_size() for x in (*inputs.values(), grad))
    assert hybrid_cost(TINY, backward=False).gb == pytest.approx(total / 1e9)


def test_a_text_within_window_and_sinks_has_no_far_operations():
    s = TINY._replace(T=TINY.window + TINY.sinks)
    assert hybrid_cost(s, backward=False).gflop == pytest.approx(s.B * s.H * s.T * (s.T + 1) / 2 * 4 * s.D / 1e9)


def test_operations_of_hybrid_grow_with_length_and_those_of_softmax_with_its_square():
    short, long = (SHAPES["8b"]._replace(T=t) for t in (2**14, 2**17))
    assert hybrid_cost(long, backward=True).gflop == pytest.approx(
        8 * hybrid_cost(short, backward=True).gflop, rel=0.01
    )
    assert softmax_cost(long, backward=True).gflop == pytest.approx(
        64 * softmax_cost(short, backward=True).gflop, rel=0.01
    )
    sums, square = (taylor_cost(long, backward=False, quadratic=q).gflop for q in (False, True))
    assert square > 20 * sums


def test_a_decoding_step_reads_the_sum_and_the_ring():
    s = SHAPES["8b"]._replace(B=3)
    sums, normalisers, slots = 153 * 128 * 4, 153 * 4, 79 * (128 + 128 + 16) * 2 + 4 * 256 * 2
    expected = 3 * 8 * ((sums + normalisers) * (1 + 2 / 32) + slots) / 1e9
    assert decode_cost(s, torch.float32).gb == pytest.approx(expected)
    saved = 3 * 8 * 153 * 128 * 2 * (1 + 2 / 32) / 1e9
    assert decode_cost(s, torch.bfloat16).gb == pytest.approx(expected - saved)


def test_definitions_agree_with_the_reference():
    inputs, _ = draw(TINY, device="cpu", dtype=torch.float64)
    options = dict(scaling=TINY.D**-0.5, window=TINY.window, sinks=TINY.sinks)
    assert relative_error(exact_hybrid(TINY, *inputs.values()), attention_quadratic(**inputs, **options)[0]) < 1e-12
    q, k, v = inputs["q"], *(inputs[n].repeat_interleave(2, 1) for n in "kv")
    wide = attention_quadratic(**inputs, scaling=TINY.D**-0.5, window=TINY.T, sinks=0)[0]
    assert relative_error(exact_softmax(q, k, v), wide) < 1e-12
    taylor = exact_taylor(q, k, v)
    weights = torch.tensor([[1 + x + x * x / 2 for x in (q[1, 3, 5] @ k[1, 3, :6].T / 4).tolist()]]).double()
    assert torch.allclose(taylor[1, 3, 5], (weights @ v[1, 3, :6] / weights.sum())[0])


@pytest.mark.parametrize("operation", ["prefill", "forward", "forward + backward"])
def test_softmax_and_reference_pass_their_check_on_a_cpu(operation):
    inputs, _ = draw(TINY._replace(T=4096, B=1, H=2, G=1), device="cpu", dtype=torch.float32)
    s = TINY._replace(T=4096, B=1, H=2, G=1)
    found = {c.label: c for c in candidates(operation, s, ["sdpa_flash", "reference"])[1:]}
    assert set(found) == {"softmax, SDPA flash", "reference, chunked"}
    for c in found.values():
        function, tensors = c.make(inputs)
        assert bench.check_forward(c, s, function, tensors) < 1e-5, c.label
        wrong = bench.check_forward(c, s, lambda *x, f=function: f(*x) * 1.1, tensors)
        assert wrong > 0.09 > c.tolerance, c.label


def test_one_gradient_that_is_wrong_shows():
    inputs, grad = draw(TINY, device="cpu", dtype=torch.float32)
    (c,) = candidates("forward + backward", TINY, ["sdpa_flash"])[1:]
    function, tensors = c.make(inputs)
    expected = bench.outputs_and_gradients(c, c.exact, [x.double() for x in tensors], grad.double())
    for call, largest in ((function, 1e-5), (lambda q, k, v: function(q, k, v.detach() + 0 * v), None)):
        got = bench.outputs_and_gradients(c, call, tensors, grad)
        errors = [relative(a, b) for a, b in zip(got, expected, strict=True)]
        assert max(errors) < 1e-5 if largest else max(errors[:3]) < 1e-5 < errors[3]
    other_way = bench.outputs_and_gradients(c._replace(checkpoints=True), function, tensors, grad)
    assert all(
        torch.equal(a, b)
        for a, b in zip(other_way[1:], bench.outputs_and_gradients(c, function, tensors, grad)[1:], strict=True)
    )


def test_every_peer_has_a_candidate_and_ours_comes_first():
    s = SHAPES["8b"]._replace(T=4096)
    for operation in ("prefill", "forward", "forward + backward"):
        found = candidates(operation, s, PEERS)
        ours = 2  # Triton, and CUDA
        assert [c.role == "ours" for c in found] == [True] * ours + [False] * (len(found) - ours)
        assert [c.role for c in found].count("fla") == 3 and [c.role for c in found].count("cudnn") == 1
        for name in PEERS:
            assert len(candidates(operation, s, [name])) > ours, name


def test_ours_at_the_recipes_window_are_timed_in_cuda_too():
    """The CUDA backward of small maps knows head dim 64 alone."""
    for name, backward in (("based", True), ("135m", True), ("8b", False)):
        s = SHAPES[name]._replace(T=2048, B=32, window=214, d=4)
        labels = [c.label for c in candidates("forward + backward", s, [])]
        expected = ["linearize training", "linearize training, CUDA forward", "linearize training, CUDA"]
        assert labels == expected[: 2 + backward]
        assert len(candidates("prefill", s, [])) == 2


def test_ratios_count_right_rows_of_the_same_group_only():
    derived = derive(make_rows(), CEILINGS)
    ours = derived[0]
    assert ours["times_cudnn"] == 2 and ours["times_fla"] == 3  # not the wrong row's
    assert ours["tflops"] == pytest.approx(50 / 8) and ours["percent_of_product"] == pytest.approx(6.25)
    assert ours["gb_per_s"] == pytest.approx(250) and ours["percent_of_copy"] == pytest.approx(25)
    assert ours["percent_of_roofline"] == pytest.approx(50)  # 4 GB at 1000 GB/s: 4 ms
    assert derived[-1]["tflops"] is None
    alone = derive(make_rows()[:1], CEILINGS)[0]
    assert alone["times_cudnn"] is None and alone["times_fla"] is None


def test_the_table_says_what_does_not_count():
    lines = table(make_rows(), CEILINGS).splitlines()
    assert lines[0] == "-- prefill, based (32 heads on 32, D 64), 16 x 4096: byte roofline 4.0000 ms"
    assert lines[1].split()[-3:] == ["50.0", "2.00", "3.00"]
    assert "(1.0000)" in lines[5] and lines[5].endswith("WRONG")
    assert lines[6].split() == ["fla", "late", "timed", "out", "after", "40", "s"]


def test_the_csv_holds_every_row(tmp_path):
    rows = [*make_rows(), *make_rows(T=8192)]
    write_csv(tmp_path / "a.csv", rows, CEILINGS, {"gpu": "a GPU"})
    with open(tmp_path / "a.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 12 and len(groups(rows)) == 2
    assert {line["gpu"] for line in read} == {"a GPU"} and {line["copy_gb_per_s"] for line in read} == {"1000.0"}
    assert read[0]["ms"] == "8.0" and read[0]["times_fla"] == "3.0" and read[5]["ms"] == ""
    assert read[5]["note"] == "timed out after 40 s"


def test_the_chart_is_drawn_of_what_was_timed(tmp_path):
    rows = [*make_rows(T=2048), *make_rows(T=4096), *make_rows(operation="decode a token", T=1)]
    assert set(panels_of(rows)) == {("prefill", "based"), ("decode a token", "based")}
    assert not [row for row in itertools.chain(*panels_of(rows).values()) if row.note or row.ms is None]
    assert draw_chart(tmp_path / "a.png", rows, CEILINGS, "title").startswith("wrote")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "no row has a time" in draw_chart(tmp_path / "b.png", [make_rows()[-1]], CEILINGS, "title")
    assert not (tmp_path / "b.png").exists()


def test_a_launchs_rate_is_bytes_over_time():
    """0.1 GB in 50 us, where copies go at 2500 GB/s."""
    assert bench_launches.rate(gb=0.1, ms=0.05, copy=2500.0) == "2000 GB/s, 80 %"


def test_failures_become_notes(monkeypatch):
    monkeypatch.setattr("linearize_kernels.bench_measure.require_gpu", lambda note: None)

    def fail(error):
        raise error

    assert attempt(lambda: None, 5) == ""
    assert attempt(lambda: time.sleep(3), 0.05) == "timed out after 0.05 s"
    assert attempt(lambda: fail(ModuleNotFoundError("no", name="fla")), 5) == "not installed (fla)"
    assert attempt(lambda: fail(torch.OutOfMemoryError("much")), 5) == "out of memory"
    assert attempt(lambda: fail(RuntimeError("bad\n  Triton")), 5) == "RuntimeError: bad Triton"
    assert attempt(lambda: require_finite([torch.tensor([1.0, torch.nan])]), 5).startswith("ArithmeticError")
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: fail(KeyboardInterrupt()), 5)


def test_calls_hold_the_same_number_of_tokens():
    choice = bench.parse([])
    for section in ("prefill", "training"):
        for s in bench.sizes(section, choice):
            assert s.B * s.T == 65536 or (s.B, s.T) == (1, 131072)
    assert [s.T for s in bench.sizes("prefill", choice)][:8] == [2**i for i in range(10, 18)]
    assert {s.B for s in bench.sizes("decode", choice) if s.name == "8b"} == {1, 4, 16, 64, 128, 256, 512, 1024}
    quick = bench.parse(["--quick", "--shapes", "8b", "--only", "prefill,decode", "--peers", "none"])
    assert [s.T for s in bench.sizes("prefill", quick)] == [4096, 16384] and quick.peers == []
    recipe = bench.parse(["--window", "214", "--map-dim", "4"])
    assert {(s.window, s.d) for name in bench.SECTIONS for s in bench.sizes(name, recipe)} == {(214, 4)}
    chosen = bench.parse(["--lengths", "1k,500", "--tokens", "4096"])
    assert {(s.B, s.T) for s in bench.sizes("training", chosen)} == {(4, 1024), (8, 500)}


@pytest.mark.parametrize(
    "arguments",
    [["--only", "all"], ["--peers", "flash"], ["--lengths", "a"], ["--batches", "0"], ["--shapes", "7b"],
     ["--lengths", "k"], ["--window", "0"], ["--map-dim", "-4"], ["--tokens", "0"]],
)
def test_unknown_choices_are_refused_with_what_is_allowed(arguments, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        bench.main([])


@pytest.mark.gpu
@pytest.mark.parametrize("section", ["prefill", "training", "decode"])
def test_a_small_section_end_to_end(section, tmp_path, capsys):
    arguments = ["--only", section, "--shapes", "135m", "--lengths", "512", "--batches", "2", "--tokens", "1024"]
    bench.main([*arguments, "--quick", "--peers", "sdpa_cudnn,sdpa_flash", "--output", str(tmp_path / "a")])
    printed = capsys.readouterr().out
    assert "measured ceilings" in printed and (tmp_path / "a.png").exists()
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if row["role"] == "ours"]
    for row in rows:
        if section == "decode" and "cuDNN" in row["implementation"]:
            continue  # its support of one query is a matter of versions
        assert not row["note"] and float(row["ms"]) > 0 and 0 < float(row["error"]) < 2e-2, row


@pytest.mark.gpu
def test_memory_that_was_never_written_shows():
    x = torch.randn(3, 700, 1001, device="cuda")
    poison(x)
    with pytest.raises(ArithmeticError):
        require_finite([torch.empty_like(x)])


@pytest.mark.gpu
def test_a_graphs_time_is_that_of_one_call():
    x = torch.randn(8, 2**26, device="cuda")
    y = torch.empty_like(x)
    _, together = measure(lambda: y.copy_(x), rep=20)
    _, one = measure_graph(lambda i: y[i].copy_(x[i]), 8, replays=4)
    assert one == pytest.approx(together / 8, rel=0.2)
