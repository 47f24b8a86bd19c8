"""The main job: load, calibrate, match, choose what stays softmax, finetune, measure, export.

The one place where the stages meet.
"""

import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors.torch import load_file, save_file

from .architecture import keep_softmax_, linearize_
from .calibrate import calibrate
from .data import build_token_data
from .errors import LinearizeError, RecipeError, TrainingError
from .export import check_free, export
from .finetune import FinetuneStage, add_lora, projection_names
from .fused_norms import fused_norms
from .kept_softmax import evenly_spaced, heads_by_layer, units_of, with_choice
from .lengths import length_problems, rows_a_forward
from .loading import load_teacher, pick_device
from .match import MatchStage
from .model_card import model_card
from .modeling_linearized import linear_attentions
from .plan import plan as plan
from .recipe import Recipe, to_yaml
from .run_log import RunLog, peak_memory_bytes
from .sequences import TokenData, model_inputs
from .text_rows import read_text_rows
from .train import train
from .trained_weights import TrainedWeights
from .work_folder import open_work

RECIPE_FILE = "recipe.yaml"
REPORT_FILES = ("report.json", "report.png")
RANK_ROWS = 8  # of held-out text, on which a choice of layers is made
WAIT = timedelta(days=7)  # the other processes wait while the main one tokenises, measures and writes


@dataclass(frozen=True)
class SharedTokens:
    """Where several conversions keep their tokenised text, and how many training sequences the longest needs."""

    folder: Path
    num_sequences: int


def sequences_needed(recipe: Recipe) -> int:
    """Training sequences that calibration and training read, repetitions aside."""
    tokens = recipe.match.tokens + recipe.finetune.tokens
    return max(1, recipe.calibrate.sequences, -(-tokens // recipe.data.sequence_length))


def convert(recipe: Recipe, *, force: bool = False, tokens: SharedTokens | None = None) -> Path:
    """Runs a recipe and returns the folder of the finished model.

    tokens: where tokenised text is kept for several conversions; by default it is this one's own.

    Work in progress is kept in `<output folder>.work`; the same call resumes it, and `force` starts over. Raises a
    LinearizeError for whatever is the user's to mend.
    """
    folder, started = recipe.output_folder, time.monotonic()
    check_free(folder, force=force)
    run = _start(recipe, force=force, tokens=tokens)
    accelerator, log = run.accelerator, run.log
    log.trackers = _trackers(recipe, accelerator)
    run.match()
    run.choose()
    run.finetune()
    report = run.report()
    if accelerator.is_main_process:
        run.export(folder, report)
        minutes, peak = (time.monotonic() - started) / 60, peak_memory_bytes() / 1e9
        log.say(f"took {minutes:.1f} minutes and at most {peak:.1f} GB of memory")
        log.close()
        shutil.rmtree(run.work)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def rank_layers(recipe: Recipe, *, force: bool = False) -> Path:
    """Calibrates and matches, then measures which layers or kv heads should stay softmax; returns a folder of results.

    The unit, the measure and how many to choose greedily come from `attention.keep_softmax` (count 0: a tenth of
    them). The work folder stays, and `convert` of the same recipe, whatever its `count`, goes on from it; it
    ranks again where the chain would begin otherwise (recall_then_kl of another count).
    """
    if recipe.attention.keep_softmax.by == "even":
        raise RecipeError("attention.keep_softmax.by: even measures nothing; rank by recall, kl or recall_then_kl")
    for problem in recipe.rank_problems():  # also where count is 0, which the recipe alone may be
        raise RecipeError(problem)
    run = _start(recipe, force=force)
    run.match()
    folder = recipe.output_folder.with_name(recipe.output_folder.name + ".ranking")
    if run.accelerator.is_main_process:
        run.rank(folder)
        run.log.close()
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return folder


def _start(recipe: Recipe, *, force: bool, tokens: SharedTokens | None = None) -> "_Run":
    """Opens the work folder and prepares the run: model converted and calibrated, text read."""
    accelerator = _accelerator(recipe)
    work = recipe.output_folder.with_name(recipe.output_folder.name + ".work")
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            open_work(work, recipe, force=force)
    log = RunLog(work / "log.jsonl", enabled=accelerator.is_main_process)
    run = _Run(recipe, accelerator, work, log, tokens=tokens or SharedTokens(work / "tokens", 0))
    try:
        run.prepare()
    except LinearizeError:
        if accelerator.is_main_process and not (work / "calibrated.safetensors").exists():
            log.close()
            shutil.rmtree(work)  # nothing in it is worth resuming
        raise
    return run


class _Run:
    """The state of one conversion between its stages."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, work: Path, log: RunLog, *, tokens: SharedTokens):
        self.recipe, self.accelerator, self.work, self.log, self.tokens = recipe, accelerator, work, log, tokens
        self.results = []

    def prepare(self) -> None:
        """Loads teacher and text, replaces the attention, and calibrates it."""
        recipe = self.recipe
        self.log.say(f"model: {recipe.model.id}")
        self.model, self.tokenizer = load_teacher(recipe.model, device=self.accelerator.device)
        set_seed(recipe.run.seed)
        linearize_(self.model, recipe.attention)
        first = next(iter(linear_attentions(self.model).values()))
        self.window, self.map_dim = first.window, first.q_map.shape[-1]
        for problem in length_problems(recipe, self.window):  # of an equal_window, which is known now
            raise RecipeError(problem)
        if recipe.finetune.tokens and recipe.finetune.train == "lora":
            projection_names(self.model, recipe.finetune.lora.targets)  # a wrong name is an error now, not later
        with self.accelerator.main_process_first():
            self.data = self._read_data()
        self.stage_data = {
            name: self.data.at(stage.sequence_length, name=f"{name}.sequence_length")
            for name, stage in recipe.trained.items()
            if stage.sequence_length is not None
        }
        self.text, self.baseline = self._read_text(), self._read_baseline()
        self.log.say(f"text: {self.data.description}")
        self._calibrate()

    def _read_data(self) -> TokenData:
        return build_token_data(
            self.recipe.data, self.tokenizer, num_train_sequences=sequences_needed(self.recipe),
            cache_dir=self.tokens.folder, num_cached=self.tokens.num_sequences,
        )  # fmt: skip

    def _read_text(self) -> tuple[str, torch.Tensor] | None:
        """evaluate.text, its name and its rows: read at the start, so that a wrong path costs no hours of training."""
        settings = self.recipe.evaluate
        if settings.text is None:
            return None
        rows = read_text_rows(
            settings.text, self.tokenizer, length=settings.sequence_length, count=4 * settings.sequences
        )
        return Path(settings.text).name, rows

    def _read_baseline(self) -> dict | None:
        """The report card in `evaluate.baseline`, read at the start as well."""
        folder = self.recipe.evaluate.baseline
        if folder is None:
            return None
        from linearize_eval.baseline import load_baseline

        return load_baseline(folder)

    def _calibrate(self) -> None:
        path, count = self.work / "calibrated.safetensors", self.recipe.calibrate.sequences
        count = count if self.recipe.has_far_term else 0
        layers = torch.nn.ModuleDict({str(i): layer for i, layer in linear_attentions(self.model).items()})
        if path.exists():
            layers.load_state_dict(load_file(path, device=str(self.accelerator.device)))
        elif count:
            batch = self.data.train.batch(range(min(count, len(self.data.train))))
            inputs = {k: v.to(self.accelerator.device) for k, v in model_inputs(batch).items()}
            errors = calibrate(self.model, inputs)
            means = {k: sum(e[k] for e in errors.values()) / len(errors) for k in ("error", "window_error")}
            self.log.write(stage="calibrate", **means, layers=errors)
            self.log.say(
                f"calibrated {len(errors)} layers: output error {means['error']:.3g}, "
                f"window + sinks alone {means['window_error']:.3g} (of the teacher's output power, mean of layers)"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not path.exists():
            save_file(layers.state_dict(), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        self.accelerator.wait_for_everyone()

    def match(self) -> None:
        if "match" in self.recipe.trained:
            self._train(MatchStage(self.model, self.recipe.match), self.recipe.match)

    def choose(self) -> None:
        """Gives what the recipe asks to be chosen its softmax back, and names it in the recipe that goes on."""
        keep = self.recipe.attention.keep_softmax
        if not keep.count:
            return
        if keep.by == "even":
            chosen = evenly_spaced(units_of(self.model, keep.unit), keep.count)
        else:
            chosen = self._ranked(keep)
        keep_softmax_(self.model, heads_by_layer(chosen))
        self.recipe = with_choice(self.recipe, chosen)
        self.log.write(stage="choose", by=keep.by, unit=keep.unit, kept=[[u.layer, u.head] for u in chosen])
        self.log.say(f"kept in softmax, by {keep.by}: {keep.unit.replace('_', ' ')}s {', '.join(map(str, chosen))}")

    def _ranked(self, keep) -> list:
        """The chosen units, by the ranking in the work folder, which is made first if need be."""
        from linearize_eval.ranking import chosen_units, load_ranking, serves

        path = self.work / "ranking.json"
        wanted = {"unit": keep.unit, "by": keep.by, "count": keep.count, "distances": self.recipe.rank_distances}
        if self.accelerator.is_main_process and not (path.exists() and serves(load_ranking(path), **wanted)):
            self._rank(keep, keep.count)
        self.accelerator.wait_for_everyone()
        return chosen_units(load_ranking(path), self.model, keep.count)

    def rank(self, folder: Path) -> None:
        """Ranks all units, from none kept to all; shows, draws and saves that, and a recipe that names the choice."""
        from linearize_eval.ranking import RANKING_FILE, chosen_units, save_ranking
        from linearize_eval.ranking_report import CHART_FILE, draw_ranking, print_ranking, recipe_lines

        keep = self.recipe.attention.keep_softmax
        count = keep.count or -(-len(units_of(self.model, keep.unit)) // 10)
        ranking = self._rank(keep, count, whole=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_ranking(ranking, folder / RANKING_FILE)
        draw_ranking(ranking, folder / CHART_FILE)
        print_ranking(ranking)
        named = with_choice(self.recipe, chosen_units(ranking, self.model, count))
        target = str(folder.with_name(self.recipe.output_folder.name + "-kept"))  # the work folder is of this recipe
        named = replace(named, output=replace(named.output, folder=target))
        (folder / RECIPE_FILE).write_text(to_yaml(named), encoding="utf-8")
        self.log.say(f"written: {folder / RANKING_FILE} and {folder / CHART_FILE}; for the recipe:")
        self.log.say(recipe_lines(ranking, count, keep))
        self.log.say(f"or: linearize convert {folder / RECIPE_FILE}, which names them and writes {target}")

    def _rank(self, keep, count: int, *, whole: bool = False) -> dict:
        """The ranking, on the end of the held-out text (the report card reads its start), saved in the work folder."""
        from linearize_eval.memory import state_bytes
        from linearize_eval.ranking import Scale, num_sets, rank, save_ranking

        total = num_sets(len(units_of(self.model, keep.unit)), count, whole=whole)
        bar = self.log.progress("ranking", start=0, total=total)
        scale = Scale(
            self.model, self._held_out_rows(from_end=True), distances=self.recipe.rank_distances,
            bos_token_id=self.tokenizer.bos_token_id, batch_size=self.recipe.run.micro_batch,
            state_bytes=lambda length: state_bytes(self.model, length), on_set=bar.update,
        )  # fmt: skip
        ranking = rank(scale, unit=keep.unit, by=keep.by, count=count, whole=whole)
        bar.close()
        save_ranking(ranking, self.work / "ranking.json")
        return ranking

    def finetune(self) -> None:
        recipe = self.recipe
        if not recipe.finetune.tokens:
            return
        set_seed(recipe.run.seed)
        if recipe.finetune.train == "lora":
            self.model = add_lora(self.model, recipe.finetune.lora)
        else:
            TrainedWeights(self.model)
        checkpointing = recipe.run.gradient_checkpointing
        stage = FinetuneStage(self.model, recipe.finetune, gradient_checkpointing=checkpointing)
        self._train(stage, recipe.finetune)
        stage.refresh()

    def _train(self, stage, settings) -> None:
        self.log.steps_before = sum(result.num_steps for result in self.results)
        rows = rows_a_forward(self.recipe, settings)
        with fused_norms(self.model):
            result = train(
                stage, self.stage_data.get(stage.name, self.data), settings, accelerator=self.accelerator,
                run=replace(self.recipe.run, micro_batch=rows), folder=self.work, log=self.log,
            )  # fmt: skip
        self.results.append(result)
        self.log.write(**{**asdict(result), "stage": result.name, "done": True})
        self.log.say(
            f"{result.name}: held-out loss {result.first_error:.4g} -> {result.best_error:.4g} "
            f"(best of {result.num_steps} steps at {result.best_step}, {result.num_tokens:,} tokens)"
        )

    def report(self) -> dict | None:
        """The report card, measured by the main process; None where the recipe asks for none."""
        from linearize_eval.report import load_report, save_report
        from linearize_eval.report_card import measure_card
        from linearize_eval.report_text import print_report

        if not self.recipe.evaluate.sequences or not self.accelerator.is_main_process:
            return None
        folder = self.work / "report"
        if not folder.exists():
            report = measure_card(
                self.model, self.tokenizer, self.recipe, rows=self._held_out_rows(), text=self.text,
                baseline=self.baseline, log=self.log,
            )  # fmt: skip
            save_report(report, folder.with_suffix(".tmp"))
            os.replace(folder.with_suffix(".tmp"), folder)
        report = load_report(folder)
        print_report(report)
        return report

    def _held_out_rows(self, *, from_end: bool = False) -> torch.Tensor:
        """[N, T] int64: the held-out tokens as plain text of the length the report card asks for.

        from_end: the last RANK_ROWS rows, which the report card does not see where there is text enough.
        """
        settings = self.recipe.evaluate
        tokens = torch.from_numpy(self.data.held_out.tokens.astype("int64"))
        length = min(settings.sequence_length, tokens.shape[0])
        rows = tokens[: tokens.shape[0] // length * length].view(-1, length)
        return rows[-RANK_ROWS:] if from_end else rows[: settings.sequences]

    def export(self, folder: Path, report: dict | None) -> None:
        """Merges LoRA in float32 and writes the folder."""
        from linearize_eval.report_text import report_markdown

        dtype = self.recipe.output.dtype
        if hasattr(self.model, "merge_and_unload"):
            self.model = _merge(self.model)
        files: dict[str, str | Path] = {
            RECIPE_FILE: to_yaml(self.recipe),
            "README.md": model_card(
                self.recipe, self.results, report_markdown(report) if report else None, window=self.window,
                map_dim=self.map_dim,
            ),
            "log.jsonl": self.work / "log.jsonl",
        }
        if (self.work / "ranking.json").exists():
            files["ranking.json"] = self.work / "ranking.json"
        if report is not None:
            files |= {name: self.work / "report" / name for name in REPORT_FILES}
        export(self.model, self.tokenizer, folder, dtype=dtype, files=files)
        self.log.say(f'done: {folder}    next: linearize generate {folder} -p "..."')


def _merge(model):
    """LoRA merged into the base weights, the sum taken in float32 whatever their dtype."""
    dtype = model.dtype
    base = [p for n, p in model.named_parameters() if "lora_" not in n and ".base_layer." in n]
    for parameter in base:
        parameter.data = parameter.data.float()
    merged = model.merge_and_unload()
    for parameter in base:
        parameter.data = parameter.data.to(dtype)
    return merged.eval()


def _accelerator(recipe: Recipe) -> Accelerator:
    device, trackers = pick_device(recipe.run.device), recipe.run.trackers
    _require_trackers(trackers)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    folder = recipe.output_folder
    return Accelerator(
        cpu=device.type == "cpu", log_with=trackers or None,
        project_dir=str(folder.with_name(folder.name + ".logs")) if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )  # fmt: skip


def _require_trackers(names) -> None:
    """Raises TrainingError unless the package of every tracker is installed."""
    from accelerate.tracking import get_available_trackers

    available = [str(getattr(t, "value", t)) for t in get_available_trackers()]
    missing = [n for n in names if n not in available]
    if missing:
        raise TrainingError(
            f"run.trackers: {', '.join(missing)} not available; installed here: {', '.join(available) or 'none'}. "
            "Install the tracker's package or leave it out; log.jsonl is always written."
        )


def _trackers(recipe: Recipe, accelerator: Accelerator):
    if not recipe.run.trackers:
        return None
    accelerator.init_trackers(recipe.name, config={"recipe": to_yaml(recipe)})
    return accelerator
