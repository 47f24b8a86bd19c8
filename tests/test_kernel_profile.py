"""The modules that tune and profile the CUDA prefill, as far as they run without a GPU."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import bench_prefill, bench_profile  # noqa: E402
from linearize_kernels.bench_shapes import SHAPES  # noqa: E402

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NAMES = ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread",
         "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", STALLED.format("barrier"),
         STALLED.format("long_scoreboard"), "sm__inst_executed_pipe_tensor_op_dmma.avg.pct_of_peak_sustained_active",
         "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active"]  # fmt: skip
PAGE = f"""==PROF== Connected to process 7
"{'","'.join(NAMES)}"
"","","us","register/thread","%","inst","inst","%","%"
"0","prefill_sums_kernel","70.5","80","61.25","0.5","1,002.25","0","9.5"
"1","prefill_kernel","640.1","128","50.00","2.5","","0","31.0"
==PROF== Disconnected
"""


def test_a_profile_says_what_limits_each_kernel():
    first, second = bench_profile.summaries(PAGE)
    assert first.startswith("prefill_sums_kernel: time 70.5 us, registers 80, DRAM % 61.25, tensor cores % 9.5\n")
    assert first.endswith("waits: long_scoreboard 1002.25, barrier 0.50")
    assert second.endswith("waits: barrier 2.50")
    with pytest.raises(ValueError, match="no kernel:\n==ERROR== permission"):
        bench_profile.summaries("==ERROR== permission")


def test_the_profiler_runs_this_very_call_at_the_clocks_there_are():
    command = bench_profile.profile_command(["backward", "--window", "214"])
    assert command[-4:] == ["backward", "--window", "214", "--once"]
    assert command[command.index("--clock-control") + 1] == "none"


def test_ways_to_cut_begin_with_the_chosen_one():
    s = SHAPES["based"]._replace(B=2, T=32768)
    ways = bench_prefill.ways(s, 4, 2)
    assert ways[0] == dict(segments=4, parts=2) and len(ways) == len({str(way) for way in ways})
    assert {way["segments"] for way in ways} == {1, 2, 4, 5, 8}
    assert dict(segments=4, parts=2, defines={"SUM_STAGES": 3}) in ways
    assert bench_prefill.ways(s._replace(T=64), 1, 2) == [dict(segments=1, parts=2), dict(segments=1, parts=1)]
