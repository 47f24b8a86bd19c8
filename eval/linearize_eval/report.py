"""The report card: what a conversion kept of its teacher, measured, saved and read back.

Every variant is the same model object under another switch (teacher, converted, far term off, window off,
training-free window + sinks), measured on the same rows. A report is a plain dict of JSON values; a figure
that came out infinite or NaN is None in it. The words and tables made from it are in `report_text`.

N rows, T tokens a row.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import linearize
from linearize.errors import DataError, ModelError
from linearize.lengths import max_positions
from linearize.output_head import Halves
from linearize_eval.chart import draw_report
from linearize_eval.json_values import finite
from linearize_eval.perplexity import evaluation_mode, perplexity, position_edges, summarize_nll, variants_nll_and_kl
from linearize_eval.recall import KeySample, build_key_samples, copy_recall, copy_rows, score_key_samples
from linearize_eval.report_text import CHART_FILE, TEACHER

FORMAT = 1
REPORT_FILE = "report.json"
MEMORY_LENGTHS = (1024, 8192, 32768)
CURVE_LENGTHS = tuple(2**power for power in range(6, 18))
SPEED_RUNS = 3

Variants = Mapping[str, Callable[[], AbstractContextManager]]


def measure_report(
    model: torch.nn.Module,
    tokenizer,
    *,
    variants: Variants,
    notes: Mapping[str, str],
    rows: torch.Tensor,
    window: int,
    recall_distances: Sequence[int],
    state_bytes: int | Callable[[int], int],
    kv_bytes: Callable[[int], int],
    text: tuple[str, torch.Tensor] | None = None,
    key_recall_samples: int = 32,
    key_recall_pairs: Sequence[int] = (4,),
    batch_tokens: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Measures every variant of `model` on `rows` and returns the report.

    A recall distance that fits neither the rows nor the model's positions is left out, and so are more pairs than fit
    a distance, with the reason in report["left_out"], which is printed; a card with a gap is worth more than none
    after hours of training.

    Args:
        model: causal LM, measured as it stands inside each variant's context.
        tokenizer: its tokenizer, for the key lookup and the BOS token.
        variants: name -> factory of the context manager that makes the model that variant, in table order.
        notes: name -> a few words printed with that variant.
        rows: held-out token ids [N, T], int64, no padding.
        window: w, tokens of exact attention.
        recall_distances: tokens, for copy recall and key lookup.
        state_bytes: bytes one sequence keeps, constant or by its length in tokens.
        kv_bytes: bytes of the teacher's KV cache by length in tokens.
        text: a name and token ids [M, T'], int64, no padding: perplexity is measured on these rows too.
        key_recall_samples: questions a distance and number of pairs; 0 leaves the key lookup out.
        key_recall_pairs: numbers of sentences planted a question.
        batch_tokens: tokens a forward: as many texts of one length as they hold, at least one.
        seed: of the key lookup's texts.
        progress: show a progress bar.

    Raises DataError if `rows` cannot be measured at all.
    """
    left_out: list[str] = []
    positions = max_positions(model)
    plan = _Plan(
        rows=rows,
        edges=position_edges(window, rows.shape[1]),
        far_from=far_start(window, rows.shape[1]),
        bos_token_id=tokenizer.bos_token_id,
        copies=_copy_distances(rows, recall_distances, tokenizer.bos_token_id, positions, left_out),
        batch_tokens=batch_tokens,
        window=window,
        text_rows=None if text is None else text[1],
    )
    if key_recall_samples:
        asked = list(itertools.product(recall_distances, key_recall_pairs))
        settings = {"num_samples": key_recall_samples, "seed": seed}
        plan.samples = _key_samples(tokenizer, rows, asked, settings, positions, left_out)
    return finite(
        {
            "format": FORMAT,
            "window": window,
            "far_from": plan.far_from,
            "edges": plan.edges,
            "variants": _measure_variants(model, variants, notes, plan, progress),
            "memory": _memory(state_bytes, kv_bytes),
            "left_out": left_out,
            "meta": _meta(model, plan, key_recall_samples, text),
        }
    )


@dataclass
class _Plan:
    """What is measured of every variant: `copies` are distances, `samples` questions by distance and pairs."""

    rows: torch.Tensor
    edges: list[int]
    far_from: int | None
    bos_token_id: int | None
    copies: list[int]
    batch_tokens: int
    window: int
    text_rows: torch.Tensor | None = None
    samples: dict[tuple[int, int], list[KeySample]] = field(default_factory=dict)

    def batch_size(self, length: int) -> int:
        """Texts of `length` tokens a forward."""
        return max(1, self.batch_tokens // length)

    @property
    def num_forwards(self) -> int:
        """Forwards a variant, those for its speed aside."""
        texts = [(len(self.rows), self.rows.shape[1]), *((len(self.rows), 2 * distance) for distance in self.copies)]
        if self.text_rows is not None:
            texts.append(tuple(self.text_rows.shape))
        texts += [(len(samples), len(samples[0].input_ids)) for samples in self.samples.values()]
        return sum(math.ceil(count / self.batch_size(length)) for count, length in texts)


def far_start(window: int, num_tokens: int) -> int | None:
    """First position from which the far term is judged: 256, or the window where that says more.

    None where rows of `num_tokens` hold no token out of the window's reach.
    """
    if window <= 256 and num_tokens >= 512:
        return 256
    return window if window < num_tokens else None


def _measure_variants(model, variants: Variants, notes, plan: _Plan, progress: bool) -> list[dict]:
    measured = []
    with evaluation_mode(model):
        halves = Halves(model)
    options = {"reference": TEACHER, "halves": halves}
    with _progress_bar(progress) as bar:
        task = bar.add_task("report card: perplexity", total=plan.num_forwards * len(variants))
        options["on_batch"] = lambda: bar.advance(task)
        batch_size = plan.batch_size(plan.rows.shape[1])
        figures = variants_nll_and_kl(model, variants, plan.rows, batch_size=batch_size, **options)
        on_text = {}
        if plan.text_rows is not None:
            length = plan.text_rows.shape[1]
            edges, batch_size = position_edges(plan.window, length), plan.batch_size(length)
            of_text = variants_nll_and_kl(model, variants, plan.text_rows, batch_size=batch_size, **options)
            on_text = {name: {"text": summarize_nll(nll, edges)} for name, (nll, _) in of_text.items()}
        for name, variant in variants.items():
            bar.update(task, description=f"report card: {name}")
            with variant():
                recall = _recall_and_speed(model, plan, halves=halves, on_batch=options["on_batch"])
            of_rows = _row_figures(*figures[name], plan)
            measured.append({"name": name, "note": notes.get(name, ""), **of_rows, **on_text.get(name, {}), **recall})
    return measured


def _row_figures(nll: torch.Tensor, kl: torch.Tensor | None, plan: _Plan) -> dict:
    """What is said of NLL and KL [N, T - 1] on the held-out rows; "kl", mean nats a token, where it was measured."""
    far = None if plan.far_from is None else nll[:, plan.far_from - 1 :].double()
    return {
        **summarize_nll(nll, plan.edges),
        "nll_by_row": nll.double().mean(dim=1).tolist(),
        "far_perplexity": None if far is None else perplexity(far),
        "far_nll_by_row": None if far is None else far.mean(dim=1).tolist(),
        **({} if kl is None else {"kl": kl.double().mean().item()}),
    }


def _recall_and_speed(model, plan: _Plan, **options) -> dict:
    """The other figures of `model` as it stands."""
    copies = [
        copy_recall(
            model,
            plan.rows,
            distances=[distance],
            batch_size=plan.batch_size(2 * distance),
            bos_token_id=plan.bos_token_id,
            **options,
        )[0]
        for distance in plan.copies
    ]
    keys = []
    for (distance, num_pairs), samples in plan.samples.items():
        batch_size = plan.batch_size(len(samples[0].input_ids))
        figures = score_key_samples(model, samples, batch_size=batch_size, **options)
        keys.append({"distance": distance, "num_pairs": num_pairs, **figures})
    speed = forward_speed(model, plan.rows[: plan.batch_size(plan.rows.shape[1])])
    return {"copy": copies, "key": keys, "tokens_per_second": speed}


def forward_speed(model: torch.nn.Module, batch: torch.Tensor) -> float:
    """Tokens a second of one forward over `batch` [B, T]: the median of a few runs after a first one."""
    batch = batch.to(model.device)
    seconds = []
    with evaluation_mode(model):
        for _ in range(1 + SPEED_RUNS):  # the first compiles and tunes: not counted
            _wait_for(model.device)
            start = time.perf_counter()
            model(batch, use_cache=False)
            _wait_for(model.device)
            seconds.append(time.perf_counter() - start)
    return batch.numel() / statistics.median(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _copy_distances(rows, distances, bos_token_id, positions, left_out) -> list[int]:
    """The distances that can be measured; why the others cannot goes to `left_out`."""
    kept = []
    for distance in distances:
        try:
            length = copy_rows(rows[:1], distance, bos_token_id=bos_token_id).shape[1]
        except DataError as error:
            left_out.append(str(error))
            continue
        if length > positions:
            left_out.append(f"copy recall over {distance} tokens: {_too_long(length, positions)}")
        else:
            kept.append(distance)
    return kept


def _key_samples(tokenizer, rows, asked, settings, positions, left_out) -> dict[tuple[int, int], list[KeySample]]:
    """Questions by (distance, pairs), built once for all variants; why one is missing goes to `left_out`."""
    kept = {}
    for distance, num_pairs in asked:
        try:
            samples = build_key_samples(tokenizer, rows, distance=distance, num_pairs=num_pairs, **settings)
        except DataError as error:
            if str(error) not in left_out:  # the same of each distance
                left_out.append(str(error))
            continue
        length = len(samples[0].input_ids)
        if length > positions:
            left_out.append(f"key recall over {distance} tokens: {_too_long(length, positions)}")
        else:
            kept[distance, num_pairs] = samples
    return kept


def _too_long(length: int, positions: float) -> str:
    return f"texts of {length} tokens do not fit the model's {positions} positions"


def _memory(state_bytes: int | Callable[[int], int], kv_bytes: Callable[[int], int]) -> dict:
    """{"table", "curve"}: [{"length", "state_bytes", "kv_bytes"}] at a few lengths and along the chart."""

    def at(length: int) -> dict:
        state = state_bytes(length) if callable(state_bytes) else state_bytes
        return {"length": length, "state_bytes": int(state), "kv_bytes": int(kv_bytes(length))}

    return {"table": [at(n) for n in MEMORY_LENGTHS], "curve": [at(n) for n in CURVE_LENGTHS]}


def _meta(model, plan: _Plan, num_questions: int, text) -> dict:
    device, rows = model.device, plan.rows
    of_text = None if text is None else {"name": text[0], "num_rows": len(text[1]), "row_tokens": text[1].shape[1]}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "num_rows": rows.shape[0],
        "row_tokens": rows.shape[1],
        "batch_size": min(plan.batch_size(rows.shape[1]), len(rows)),
        "text": of_text,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": name,
        "key_questions": num_questions,
        "versions": {module.__name__: module.__version__ for module in (linearize, torch, transformers)},
    }


def _progress_bar(visible: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not visible)


def save_report(report: dict, folder: str | Path) -> None:
    """Writes report.json and its chart report.png into `folder`, which is made if need be.

    The report may hold more than `measure_report` put there; under "tasks" {"teacher": results of
    `harness.evaluate_model`, "converted": ...} is printed with the rest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(report), indent=1, allow_nan=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    draw_report(report, folder / CHART_FILE)


def load_report(folder: str | Path) -> dict:
    """The report saved in `folder`. Raises ModelError if there is none or it cannot be read."""
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        raise ModelError(
            f"no report card in {folder}: {REPORT_FILE} is missing. `linearize convert` writes one into "
            "every folder it makes; give such a folder"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is damaged ({error}); `linearize convert` writes it anew") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        found = report.get("format") if isinstance(report, dict) else None
        raise ModelError(
            f"{path} is a report of format {found}; this version reads {FORMAT}: `linearize convert` writes "
            "it anew"
        )
    return report
