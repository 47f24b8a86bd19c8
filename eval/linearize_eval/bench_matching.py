"""Speed and memory of the matching stage on models of random weights.

    python -m linearize_eval.bench_matching [--shapes 135m,1b] [--batches 4,16,64] [--length 2048] [--csv FILE]

It runs `linearize.train.train` with a `MatchStage`, as a conversion does: a whole step reads its batch, runs the
bfloat16 teacher's forward with each layer's forward, loss and backward inside it, clips, steps AdamW and logs. Step
times are those of the run's own log, without the first ones. Weights and tokens are random; speed does not depend on
their values.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

from linearize.architecture import linearize_
from linearize.match import MatchStage
from linearize.recipe import AttentionSettings, MatchSettings, RunSettings
from linearize.run_log import RunLog, peak_memory_bytes
from linearize.sequences import PackedSequences, TokenData
from linearize.train import train

SHAPES = {  # of SmolLM2-135M and Llama-3.2-1B
    "135m": dict(
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "1b": dict(
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, hidden_size=2048, intermediate_size=8192,
        vocab_size=128256, tie_word_embeddings=True,
    ),
}  # fmt: skip
NEVER = 10**9


class Speed(NamedTuple):
    """Of one shape and batch; None where it did not fit."""

    shape: str
    batch: int
    length: int
    documents: int  # in a sequence; above 1 rows are packed, and layers get segments
    tokens_per_second: float | None
    peak_gib: float | None  # of PyTorch's allocations on a GPU, else resident
    first_loss: float | None
    last_loss: float | None


def measure_matching(name: str, config: LlamaConfig, *, batch: int, length: int, steps: int = 10, skip: int = 3,
                     documents: int = 1, device: str = "cuda") -> Speed:  # fmt: skip
    """Matches a random bfloat16 model of this config for `steps` steps; figures are of those after `skip`."""
    if not 0 <= skip < steps:
        raise ValueError(f"{steps} steps, of which {skip} are not counted: none is left")
    torch.manual_seed(0)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    stage = MatchStage(linearize_(model, AttentionSettings()), MatchSettings())
    tokens = batch * length
    settings = MatchSettings(tokens=steps * tokens, batch_tokens=tokens, evaluate_every=NEVER, patience=0)
    data = _random_data(config.vocab_size, batch=batch, length=length, documents=documents)
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder) / "log.jsonl")
        train(
            stage, data, settings, run=RunSettings(micro_batch=batch, checkpoint_every=NEVER),
            accelerator=Accelerator(cpu=device == "cpu"), folder=Path(folder), log=log,
        )  # fmt: skip
        log.close()
        records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    taken = [record for record in records if "tokens_per_second" in record]
    seconds = [tokens / record["tokens_per_second"] for record in taken[skip:]]
    losses = taken[0]["loss"], taken[-1]["loss"]
    return Speed(
        name, batch, length, documents, tokens * len(seconds) / sum(seconds), peak_memory_bytes() / 2**30, *losses
    )


def _random_data(vocabulary: int, *, batch: int, length: int, documents: int) -> TokenData:
    random = np.random.default_rng(0)

    def sequences(count):
        tokens = random.integers(0, vocabulary, count * length).astype(np.uint32)
        starts = np.arange(0, count * length, max(1, length // documents))
        return PackedSequences(tokens, starts, length, True, 0)

    return TokenData(sequences(batch), sequences(1), "random tokens")


def main(arguments=None) -> list[Speed]:
    """Measures what the command line asks for and prints a line each. Raises SystemExit without a GPU."""
    choice = _parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: the matching stage, bfloat16, random weights")
    print(f"{'shape':8}{'batch':>6}{'length':>8}{'tokens/s':>11}{'peak GiB':>10}{'first loss':>12}{'last':>9}")
    rows = []
    for name in choice.shapes:
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=max(8192, choice.length))
        for batch in choice.batches:
            options = dict(batch=batch, length=choice.length)
            try:
                row = measure_matching(name, config, **options, steps=choice.steps, documents=choice.documents)
            except torch.OutOfMemoryError:
                row = Speed(name, batch, choice.length, choice.documents, None, None, None, None)
            print(_line(row), flush=True)
            rows.append(row)
    if choice.csv:
        with open(choice.csv, "w", newline="") as file:
            csv.writer(file).writerows([Speed._fields, *rows])
    return rows


def _line(row: Speed) -> str:
    start = f"{row.shape:8}{row.batch:6}{row.length:8}"
    if row.tokens_per_second is None:
        return f"{start}  out of memory"
    return f"{start}{row.tokens_per_second:11,.0f}{row.peak_gib:10.2f}{row.first_loss:12.4f}{row.last_loss:9.4f}"


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="linearize_eval.bench_matching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=_shapes, default=list(SHAPES), help=f"by commas: {', '.join(SHAPES)}")
    parser.add_argument("--batches", type=_numbers, default=[4, 16, 64], help="sequences of a step, by commas")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--documents", type=int, default=1, help="documents packed in a sequence")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run; three are not counted")
    parser.add_argument("--csv", help="also write the table here")
    return parser.parse_args(arguments)


def _shapes(text: str) -> list[str]:
    names = text.lower().split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(SHAPES)}")
    return names


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not numbers of at least 1")
    return numbers


if __name__ == "__main__":
    main()
