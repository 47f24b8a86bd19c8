"""The one training loop, used by matching and finetuning: accumulate, clip, schedule, evaluate, resume.

A stage says how a micro-batch becomes gradients; the loop does the rest, on any number of processes. Which
sequences a step takes, in what order, and what dropout drops follow from the step's number, so a run that was killed
goes on with the losses it would have had (on a GPU, up to rounding: its first steps are not recorded yet).
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy
import torch

from .batch_graph import BatchGraph, NotRecorded, why_not
from .compiled_layers import CompiledLayers, pays
from .errors import TrainingError
from .run_log import RunLog
from .sequences import PackedSequences, TokenData, batch_indices
from .softmax_by_text import SoftmaxByText
from .softmax_by_text import why_not as why_not_by_text
from .variants import dropped_window


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate, clipped together; `name` is what errors and logs call them."""

    name: str
    parameters: list[torch.nn.Parameter]
    lr: float


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    model: torch.nn.Module
    order: int  # added to the run's seed, so that stages take the sequences in different orders
    groups: list[ParameterGroup]

    def num_terms(self, batch: dict[str, torch.Tensor]) -> int:
        """How many terms the loss of this batch sums over: sequences, or tokens."""

    def run(self, batch: dict[str, torch.Tensor], *, scale: torch.Tensor, backward: bool) -> dict[str, torch.Tensor]:
        """Loss terms of one micro-batch times `scale`, with gradients if `backward`.

        Returns scalars by name, "loss" among them, which add up over micro-batches and processes. Nothing in it waits
        for the device.
        """


@dataclass(frozen=True)
class StageResult:
    """How a stage ended. Errors are held-out losses."""

    name: str
    num_steps: int
    num_tokens: int
    first_error: float
    best_error: float
    best_step: int


def train(stage: Stage, data: TokenData, settings, *, run, accelerator, folder: Path, log: RunLog) -> StageResult:
    """Trains the stage's parameters in place and leaves them at their best held-out loss.

    settings: the stage's section of the recipe; run: the recipe's `run` section. Checkpoints go to `folder`; if one
    is there, training goes on from it. Raises TrainingError when a loss or gradient is not finite; the last good
    checkpoint stays.
    """
    loop = _Loop(stage, data, settings, run, accelerator, folder, log)
    loop.resume()
    loop.compile()
    loop.take_texts()
    loop.record()
    loop.train()
    return loop.result()


class _Loop:
    def __init__(self, stage, data, settings, run, accelerator, folder, log):
        self.stage, self.data, self.settings, self.run = stage, data, settings, run
        self.train_rows = data.train.with_repeated_passages(
            settings.repeated_passages, seed=(run.seed, stage.order)
        )  # the held-out ones stay as they are: losses compare between runs
        self.accelerator, self.log, self.path = accelerator, log, folder / f"{stage.name}.pt"
        self.batch_size = max(1, settings.batch_tokens // data.train.sequence_length)
        if self.batch_size < accelerator.num_processes:
            raise TrainingError(
                f"{stage.name}.batch_tokens = {settings.batch_tokens} holds {self.batch_size} sequences of "
                f"{data.train.sequence_length} tokens, fewer than the {accelerator.num_processes} processes. Raise it."
            )
        self.tokens_per_step = self.batch_size * data.train.sequence_length
        self.num_steps = math.ceil(settings.tokens / self.tokens_per_step)
        self.optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.lr} for g in stage.groups], weight_decay=settings.weight_decay,
            fused=accelerator.device.type == "cuda",
        )  # fmt: skip
        self.parameters = [p for g in stage.groups for p in g.parameters]
        self.compiled, self.has_run_compiled = nullcontext, False  # makes the context in which a micro-batch trains
        self.train_batch, self.graph = self.run_compiled, None  # how a micro-batch runs with gradients
        self.by_text = None  # a SoftmaxByText
        self.step, self.bad_evaluations, self.finished = 0, 0, False
        self.first_error, self.best_error, self.best_step, self.best = math.inf, math.inf, 0, None

    def compile(self) -> None:
        """Has training compiled where `run.compile` says so, or says nothing and it pays; resumed or not, the same."""
        chosen, tokens = self.run.compile, self.num_steps * self.tokens_per_step // self.accelerator.num_processes
        if chosen is None:
            chosen = pays(self.accelerator.device, tokens)
        if chosen and not self.finished:
            self.compiled = CompiledLayers(self.stage.model).on
            self.log.say(f"{self.stage.name}: layers are compiled in the first step (run.compile: false: never)")

    def take_texts(self) -> None:
        """Has softmax go text by text where `run.softmax_by_text` says so, or says nothing and it can."""
        reason = why_not_by_text(self.accelerator.device, self.stage.model, self.data.train)
        if self.run.softmax_by_text and reason:
            raise TrainingError(f"run.softmax_by_text: not in {self.stage.name}: {reason}. Set it to null.")
        if self.run.softmax_by_text is not False and not reason and not self.finished:
            self.by_text = SoftmaxByText(self.stage.model, self.data.train)
            most = self.by_text.most(self.run.micro_batch)
            words = f"in micro-batches of up to {most} texts (run.softmax_by_text: false: never); others take a mask"
            self.log.say(f"{self.stage.name}: softmax goes text by text {words}")

    def record(self) -> None:
        """Has micro-batches recorded as a CUDA graph where `run.cuda_graph` says so, or says nothing and it can be."""
        reason = why_not(self.accelerator.device, self.stage.model, self.data.train, self.settings)
        if self.run.cuda_graph and reason:
            raise TrainingError(f"run.cuda_graph: {self.stage.name} cannot be recorded: {reason}. Set it to null.")
        if self.run.cuda_graph is not False and not reason and not self.finished:
            self.log.say(f"{self.stage.name}: micro-batches become a CUDA graph (run.cuda_graph: false: never)")
            self.graph = BatchGraph(self.run_compiled, self.accelerator.device)
            self.train_batch = self.run_recorded

    def train(self) -> None:
        bar = self.log.progress(self.stage.name, start=self.step, total=self.num_steps)
        if self.step == 0 and not self.finished:
            self.evaluate()
        while self.step < self.num_steps and not self.finished:
            self.train_step(bar)
            last = self.step == self.num_steps
            if last or self.step % self.settings.evaluate_every == 0:
                self.evaluate()
            self.finished = last or bool(self.settings.patience) and self.bad_evaluations >= self.settings.patience
            if self.finished or self.step % self.run.checkpoint_every == 0:
                self.save()
        bar.close()
        self.train_batch = self.graph = None  # and its memory
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)

    def train_step(self, bar) -> None:
        started = time.perf_counter()
        self.seed_dropout()
        self.optimizer.zero_grad(set_to_none=False)  # a recorded micro-batch adds to these very tensors
        indices = batch_indices(
            len(self.train_rows), batch_size=self.batch_size, step=self.step, seed=self.run.seed + self.stage.order
        )
        sums = self.sum_batches(self.train_rows, indices, backward=True)
        self.reduce_gradients()
        figures, norms = self.clip(sums)
        rate = self.schedule()
        for group, settings in zip(self.optimizer.param_groups, self.stage.groups, strict=True):
            group["lr"] = settings.lr * rate
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        self.log.step(
            bar, self.stage.name, self.step, **_shown(figures), grad_norm=max(norms.values()),
            lr=self.optimizer.param_groups[0]["lr"], tokens_per_second=self.tokens_per_step / seconds,
        )  # fmt: skip

    def seed_dropout(self) -> None:
        """Random numbers of a step (dropout's, the window's) follow from its number, on every device and process."""
        entropy = [self.run.seed, self.stage.order, self.step, self.accelerator.process_index]
        torch.manual_seed(int(numpy.random.SeedSequence(entropy).generate_state(1)[0]))

    def schedule(self) -> float:
        """Linear warm-up, then a cosine to a tenth, as a factor of the peak rate."""
        warmup = max(1, round(self.settings.warmup * self.num_steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.num_steps - warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))

    def window_dropout(self) -> float:
        """Chance of a shorter window in a micro-batch: from the recipe's, linearly to 0 at the end of training."""
        return self.settings.window_dropout * (1 - self.step / self.num_steps)

    def run_batches(self, sequences: PackedSequences, indices: list[int], *, backward: bool) -> dict[str, float]:
        """`sum_batches` as numbers."""
        return _numbers(self.sum_batches(sequences, indices, backward=backward))

    def sum_batches(self, sequences: PackedSequences, indices: list[int], *, backward: bool) -> dict[str, torch.Tensor]:
        """Figures over all `indices`, this process's share of them run in micro-batches, summed over processes.

        Scalars on the device, which is not waited for: all it needs is sent before the first micro-batch runs.
        """
        mine = indices[self.accelerator.process_index :: self.accelerator.num_processes]
        batches = list(_micro_batches(sequences, mine, self.run.micro_batch))
        terms = self.num_terms(batches)
        if self.by_text:
            batches = [self.by_text.bounded(batch, always=backward and self.graph is not None) for batch in batches]
        batches = [{name: t.to(self.accelerator.device) for name, t in batch.items()} for batch in batches]
        scale = torch.tensor(1 / max(terms, 1), device=self.accelerator.device)
        names, total = [], 0
        for batch in batches:
            by_text = self.by_text.on(batch) if self.by_text else nullcontext()
            with dropped_window(self.stage.model, self.window_dropout() if backward else 0), by_text:
                figures = (
                    self.train_batch(batch, scale=scale)
                    if backward
                    else self.stage.run(batch, scale=scale, backward=False)
                )
            names, total = list(figures), total + torch.stack([v.detach().double() for v in figures.values()])
        totals = dict(zip(names, total, strict=True)) if names else {}
        return self._sum_over_processes(totals) if self.accelerator.num_processes > 1 else totals

    def run_recorded(self, batch, *, scale) -> dict[str, torch.Tensor]:
        """`run_compiled` by its recording; plain, if nobody asked for one and it cannot be made."""
        try:
            return self.graph(batch, scale=scale)
        except NotRecorded as error:
            if self.run.cuda_graph:
                words = f"{self.stage.name}: no CUDA graph: {error}. Set run.cuda_graph to null."
                raise TrainingError(words) from error
            self.log.say(f"{self.stage.name}: micro-batches are not recorded as a CUDA graph: {error}")
        self.train_batch, self.graph = self.run_compiled, None
        return self.run_compiled(batch, scale=scale)

    def run_compiled(self, batch, *, scale) -> dict[str, torch.Tensor]:
        """`stage.run` with gradients, compiled where that was chosen; plain, if nobody asked and the compiler fails."""
        options = {"scale": scale, "backward": True}
        if self.compiled is nullcontext:
            return self.stage.run(batch, **options)
        from torch._dynamo.exc import TorchDynamoException

        try:
            with self.compiled():
                figures = self.stage.run(batch, **options)
        except TorchDynamoException as error:
            why = str(error).strip().partition("\n")[0]
            if self.run.compile or self.has_run_compiled:
                words = f"{self.stage.name}: torch.compile failed: {why}. Set run.compile to false."
                raise TrainingError(words) from error
            self.log.say(f"{self.stage.name}: not compiled, as torch.compile failed: {why}")
            self.compiled = nullcontext
            self.optimizer.zero_grad(set_to_none=False)  # of the part of the batch that ran
            return self.stage.run(batch, **options)
        self.has_run_compiled = True
        return figures

    def num_terms(self, batches: list[dict[str, torch.Tensor]]) -> int:
        """How many terms the loss sums over, in these batches (on the CPU) and those of the other processes."""
        terms = sum(self.stage.num_terms(batch) for batch in batches)
        if self.accelerator.num_processes > 1:
            terms = self.accelerator.reduce(torch.tensor(terms, device=self.accelerator.device), "sum").item()
        return terms

    def _sum_over_processes(self, totals):
        """Adds the figures of all processes, of which one may have had no share."""
        names = sorted({n for part in _gather_objects(sorted(totals)) for n in part})
        zero = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        summed = self.accelerator.reduce(torch.stack([totals.get(n, zero).to(zero) for n in names]), "sum")
        return dict(zip(names, summed, strict=True))

    def reduce_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in self.parameters])
            flat = self.accelerator.reduce(flat, "sum")
            for parameter, part in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter))

    def clip(self, sums: dict[str, torch.Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Clips each group. Returns the figures of the step, and the groups' norms before, as numbers.

        Here, once a step, the device is waited for. Raises TrainingError if anything is not finite, and names it.
        """
        norms = {
            f"gradient of {g.name}": torch.nn.utils.clip_grad_norm_(g.parameters, self.settings.clip)
            for g in self.stage.groups
        }
        numbers = _numbers({**sums, **norms})
        self.require_finite(self.step + 1, numbers)
        return {n: numbers[n] for n in sums}, {n: numbers[n] for n in norms}

    def require_finite(self, step: int, figures: dict[str, float]) -> None:
        bad = sorted(name for name, value in figures.items() if not math.isfinite(value))
        if not bad:
            return
        self.log.write(stage=self.stage.name, step=step, not_finite=bad)
        kept = f"the checkpoint of an earlier step stays in {self.path}" if self.path.exists() else "no checkpoint yet"
        raise TrainingError(
            f"{self.stage.name}, step {step}: not finite: {', '.join(bad)}; {kept}. Lower {self.stage.name}.lr or "
            f"{self.stage.name}.clip, then run the command with --force to start over."
        )

    @torch.no_grad()
    def evaluate(self) -> None:
        figures = self.run_batches(self.data.held_out, list(range(len(self.data.held_out))), backward=False)
        error = figures["loss"]
        self.require_finite(self.step, {f"held-out {name}": value for name, value in figures.items()})
        self.log.write(stage=self.stage.name, step=self.step, held_out=figures)
        if self.step == 0:
            self.first_error = error
        if self.best is None or error < self.best_error:
            self.best_error, self.best_step, self.bad_evaluations = error, self.step, 0
            self.best = [p.detach().clone() for p in self.parameters]
        else:
            self.bad_evaluations += 1

    def save(self) -> None:
        """Writes the checkpoint whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step, "finished": self.finished, "first_error": self.first_error,
            "best_error": self.best_error, "best_step": self.best_step, "bad_evaluations": self.bad_evaluations,
            "parameters": [p.detach() for p in self.parameters], "best": self.best,
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        temporary = self.path.with_suffix(".tmp")
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as either
            temporary.unlink(missing_ok=True)
            raise TrainingError(
                f"the checkpoint {self.path} could not be written: {error}. An earlier one stays; make room, then "
                "give the same command again to resume."
            ) from error

    def resume(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.accelerator.device, weights_only=True)
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "finished", "first_error", "best_error", "best_step", "bad_evaluations", "best"):
            setattr(self, name, state[name])
        self.log.say(f"{self.stage.name}: {'done before' if self.finished else f'going on after step {self.step}'}")

    def result(self) -> StageResult:
        tokens = self.step * self.tokens_per_step
        return StageResult(self.stage.name, self.step, tokens, self.first_error, self.best_error, self.best_step)


def _micro_batches(sequences: PackedSequences, indices: list[int], size: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(indices), size):
        yield sequences.batch(indices[start : start + size])


def _numbers(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars of one device, read in one copy."""
    values = torch.stack([v.double() for v in figures.values()]).tolist() if figures else []
    return dict(zip(figures, values, strict=True))


def _gather_objects(names: list[str]) -> list[list[str]]:
    from accelerate.utils import gather_object

    return gather_object([names])


def _shown(figures: dict[str, float]) -> dict:
    """Figures for the log: per-layer losses become a list and the worst layer."""
    layers = {int(n.removeprefix("layer ")): v for n, v in figures.items() if n.startswith("layer ")}
    shown = {n: v for n, v in figures.items() if not n.startswith("layer ")}
    if layers:
        worst = max(layers, key=layers.get)
        shown |= {"worst": layers[worst], "worst_layer": worst, "layers": [round(layers[i], 6) for i in sorted(layers)]}
    return shown
