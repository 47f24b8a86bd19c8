"""Speed and memory of matching and finetuning on models of random weights, with and without torch.compile.

    python -m linearize_eval.bench_training [--stages match,finetune] [--shapes 135m,1b] [--batches 4,16,64]
        [--length 2048] [--documents 1] [--window 64] [--map-dim 16] [--compile no,yes] [--by-text yes] [--profile]
        [--csv FILE]

It runs `linearize.train.train` with a stage, as a conversion does: a whole step reads its batch, runs the bfloat16
model forward and backward (in matching each layer's inside the teacher's forward; in finetuning LoRA of rank 32 on all
projections, against the teacher's distribution), clips, steps AdamW and logs. Step times are those of the run's own
log, without the first ones. Weights and tokens are random; speed does not depend on their values. --profile adds two
steps that are not counted, and prints where the GPU's time goes in them.
"""

import argparse
import csv
import itertools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

from linearize.architecture import linearize_
from linearize.cli_values import listed, positive
from linearize.finetune import FinetuneStage, add_lora
from linearize.fused_norms import fused_norms
from linearize.match import MatchStage
from linearize.recipe import (
    AttentionSettings,
    FeatureMapSettings,
    FinetuneSettings,
    LoraSettings,
    LossSettings,
    MatchSettings,
    RunSettings,
)
from linearize.run_log import RunLog, peak_memory_bytes
from linearize.sequences import PackedSequences, TokenData
from linearize.train import train

from .profiled_log import PROFILED, ProfiledLog

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
STAGES = ("match", "finetune")
BY_TEXT = {"auto": None, "yes": True, "no": False}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Speed(NamedTuple):
    """Of one stage, shape and batch; None where it did not fit."""

    stage: str
    shape: str
    batch: int
    length: int
    documents: int  # in a sequence; above 1 rows are packed, and layers get segments
    window: int
    map_dim: int
    compiled: bool
    tokens_per_second: float | None = None
    first_seconds: float | None = None  # of the first step, in which kernels and layers are compiled
    peak_gib: float | None = None  # of PyTorch's allocations on a GPU, else resident
    first_loss: float | None = None
    last_loss: float | None = None


def measure_training(stage: str, name: str, config: LlamaConfig, *, batch: int, length: int, steps: int = 10,
                     skip: int = 3, documents: int = 1, window: int = 64, map_dim: int = 16, compile: bool = False,
                     by_text: bool | None = None, profile: bool = False, device: str = "cuda") -> Speed:  # fmt: skip
    """Trains a random bfloat16 model of this config for `steps` steps; figures are of those after `skip`.

    stage: one of STAGES. window, map_dim: of every layer's attention. by_text: `run.softmax_by_text`. profile: prints
    where the time of two more steps goes. Raises ValueError where no step counts.
    """
    if not 0 <= skip < steps:
        raise ValueError(f"{steps} steps, of which {skip} are not counted: none is left")
    torch.manual_seed(0)
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    tokens = batch * length
    total = steps + (PROFILED if profile else 0)
    loop = dict(tokens=total * tokens, batch_tokens=tokens, evaluate_every=NEVER, patience=0)
    attention = AttentionSettings(window=window, feature_map=FeatureMapSettings(dim=map_dim))
    made, settings = make_stage(stage, config, attention, loop, device=device)
    data = _random_data(config.vocab_size, batch=batch, length=length, documents=documents)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        log = ProfiledLog(path, after=steps) if profile else RunLog(path)
        with fused_norms(made.model):
            train(
                made, data, settings, accelerator=Accelerator(cpu=device == "cpu"), folder=Path(folder), log=log,
                run=RunSettings(
                    micro_batch=batch, checkpoint_every=NEVER, compile=compile, softmax_by_text=by_text
                ),
            )  # fmt: skip
        log.close()
        records = [json.loads(line) for line in path.read_text().splitlines()]
    taken = [record for record in records if "tokens_per_second" in record][:steps]
    seconds = [tokens / record["tokens_per_second"] for record in taken]
    counted = seconds[skip:]
    return Speed(
        stage, name, batch, length, documents, window, map_dim, compile, tokens * len(counted) / sum(counted),
        seconds[0], peak_memory_bytes() / 2**30, taken[0]["loss"], taken[-1]["loss"],
    )  # fmt: skip


def make_stage(stage: str, config: LlamaConfig, attention: AttentionSettings, loop: dict, *, device: str):
    """(stage, its settings) over a random model, as a recipe for a GPU would have them."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model = linearize_(model, attention)
    if stage == "match":
        settings = MatchSettings(**loop)
        return MatchStage(model, settings), settings
    lora = LoraSettings(rank=32, alpha=32.0, targets=PROJECTIONS)
    settings = FinetuneSettings(**loop, lora=lora, loss=LossSettings(ce=0.0, kl=1.0))
    return FinetuneStage(add_lora(model, lora), settings), settings


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
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: bfloat16, random weights; window {choice.window}, "
        f"map dim {choice.map_dim}, documents a sequence {choice.documents}"
    )
    print(
        f"{'stage':10}{'shape':8}{'batch':>6}{'length':>8}{'compiled':>10}{'tokens/s':>11}{'first step s':>14}"
        f"{'peak GiB':>10}{'first loss':>12}{'last':>9}"
    )
    cells = itertools.product(choice.stages, choice.shapes, choice.batches, choice.compile)
    rows = [_measure(cell, choice) for cell in cells]
    if choice.csv:
        with open(choice.csv, "w", newline="") as file:
            csv.writer(file).writerows([Speed._fields, *rows])
    return rows


def _measure(cell, choice) -> Speed:
    stage, shape, batch, compile = cell
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=max(8192, choice.length))
    settings = dict(
        batch=batch, length=choice.length, documents=choice.documents, window=choice.window, map_dim=choice.map_dim
    )
    compile, options = compile == "yes", dict(steps=choice.steps, by_text=BY_TEXT[choice.by_text])
    try:
        row = measure_training(
            stage, shape, config, **settings, **options, compile=compile, profile=choice.profile
        )
    except torch.OutOfMemoryError:
        row = Speed(stage, shape, **settings, compiled=compile)
    print(_line(row), flush=True)
    return row


def _line(row: Speed) -> str:
    start = f"{row.stage:10}{row.shape:8}{row.batch:6}{row.length:8}{'yes' if row.compiled else 'no':>10}"
    if row.tokens_per_second is None:
        return f"{start}  out of memory"
    return (
        f"{start}{row.tokens_per_second:11,.0f}{row.first_seconds:14.1f}{row.peak_gib:10.2f}"
        f"{row.first_loss:12.4f}{row.last_loss:9.4f}"
    )


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="linearize_eval.bench_training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=_some_of(STAGES), default=list(STAGES), help=f"by commas: {', '.join(STAGES)}")
    parser.add_argument("--shapes", type=_some_of(SHAPES), default=list(SHAPES), help=f"by commas: {', '.join(SHAPES)}")
    parser.add_argument("--batches", type=listed(positive), default=[4, 16, 64], help="sequences of a step, by commas")
    parser.add_argument("--length", type=positive, default=2048, help="tokens of a sequence")
    parser.add_argument("--documents", type=positive, default=1, help="documents packed in a sequence")
    parser.add_argument("--window", type=positive, default=64, help="tokens that are attended to exactly")
    parser.add_argument("--map-dim", type=positive, default=16, help="of the far term's map")
    parser.add_argument("--compile", type=_some_of(("no", "yes")), default=["no", "yes"], help="no, yes or both")
    parser.add_argument("--by-text", choices=list(BY_TEXT), default="auto", help="softmax of packed rows text by text")
    parser.add_argument("--steps", type=positive, default=10, help="steps of a run; three are not counted")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of the GPU's time")
    parser.add_argument("--csv", help="also write the table here")
    return parser.parse_args(arguments)


def _some_of(known):
    def parse(text: str) -> list[str]:
        names = text.lower().split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    main()
