"""`linearize sweep`: a recipe converted by every combination of some settings, resumable, with one table of results.

`<output folder>.sweep` holds a folder a variant (report and recipe, the weights only if asked for), beside it what came
of it as VARIANT.json, the tokens that variants share until all are done, and results.csv and results.png.
"""

import gc
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from linearize.convert import SharedTokens, convert, sequences_needed
from linearize.errors import LinearizeError, RecipeError, TrainingError
from linearize.file_lock import lock
from linearize.recipe import Recipe, load_recipe
from linearize.whole_folder import write_json
from linearize.work_folder import settings_of
from linearize_eval.report import load_report
from linearize_eval.sweep_results import figures_of, show_results, value_of, write_results

KEPT = {"report.json", "report.png", "recipe.yaml", "log.jsonl", "ranking.json"}  # where models are not
BASE_FILE, LOCK_FILE = "sweep.json", ".lock"


@dataclass(frozen=True)
class Variant:
    """One combination: its name, its value of every setting of the grid, and the recipe that comes of it."""

    name: str
    grid: dict
    recipe: Recipe


def sweep(source: str, *, grid: Sequence[str], overrides: Sequence[str] = (), keep_models: bool = False) -> Path:
    """Converts every variant that is not done yet, shows the results, and returns the folder that holds them.

    source, overrides: as for `load_recipe`. grid: `a.b=value,value` texts, the product of which is taken.
    Raises RecipeError, before anything is converted, where a variant's recipe is wrong, LinearizeError where another
    sweep is running in the folder, and LinearizeError in the end where a variant failed; the others are converted all
    the same.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LinearizeError("sweep runs in one process; start it without accelerate launch or torchrun")
    base = load_recipe(source, overrides)
    folder = base.output_folder.with_name(base.output_folder.name + ".sweep")
    variants = plan_sweep(source, folder, grid=grid, overrides=overrides)
    with _alone_in(folder):
        _open(folder, base)
        shared = SharedTokens(folder / "tokens", max(sequences_needed(variant.recipe) for variant in variants))
        for number, variant in enumerate(variants, 1):
            print(f"\n[{number}/{len(variants)}] {variant.name}", flush=True)
            if _read(folder / f"{variant.name}.json").get("figures"):
                kept = any(variant.recipe.output_folder.glob("*.safetensors"))
                print("done before" if kept or not keep_models else "done before without --keep-models: has no weights")
            else:
                _convert(variant, folder, shared, keep_models=keep_models)
            write_results(folder, base, _records(folder, variants))
        show_results(folder, base, _records(folder, variants))
        failed = {v.name: error for v in variants if (error := _read(folder / f"{v.name}.json").get("error"))}
        if failed:
            lines = [f"  {name}: {error}" for name, error in failed.items()]
            raise LinearizeError("\n".join([f"{len(failed)} of {len(variants)} variants failed:", *lines]))
        shutil.rmtree(shared.folder, ignore_errors=True)
    return folder


def plan_sweep(source: str, folder: Path, *, grid: Sequence[str], overrides: Sequence[str]) -> list[Variant]:
    """Every variant, in the order of the product. Raises RecipeError with what is wrong with a grid or a recipe."""
    axes = dict(_parse_axis(text) for text in grid)
    if len(axes) < len(grid):
        raise RecipeError("--grid: a setting is named twice; give all its values in one")
    variants = []
    for values in itertools.product(*axes.values()):
        chosen = [*overrides, *(f"{path}={value}" for path, value in zip(axes, values, strict=True))]
        recipe = load_recipe(source, chosen)
        if not recipe.evaluate.sequences:
            raise RecipeError("evaluate.sequences: is 0, so there would be no report card to compare; set it")
        settings = {path: value_of(recipe, path) for path in axes}
        name = variant_name(settings)
        place = f"output.folder={json.dumps(str(folder / name), ensure_ascii=False)}"
        variants.append(Variant(name, settings, load_recipe(source, [*chosen, place])))
    names = [variant.name for variant in variants]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RecipeError(f"--grid: gives a variant twice: {', '.join(repeated)}")
    return variants


def variant_name(settings: dict) -> str:
    """A folder's name that says the settings: 'attention.window=32,finetune.lr=0.001'."""
    written = (f"{k}={v if isinstance(v, str) else json.dumps(v, separators=(',', ':'))}" for k, v in settings.items())
    full = ",".join(written)
    safe = re.sub(r"[^\w.=,+\-\[\]]", "_", full)
    if safe == full and len(full) <= 150:
        return full
    return f"{safe[:100]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def _parse_axis(text: str) -> tuple[str, list[str]]:
    """'a.b=8,[0, 1]' -> ('a.b', ['8', '[0, 1]']). Whether there is such a setting, `load_recipe` says."""
    path, equals, values = text.partition("=")
    path = path.strip()
    if not equals or not values.strip():
        raise RecipeError(f"--grid {text}: write it as attention.window=32,64")
    if path.startswith("output."):
        raise RecipeError(f"--grid {path}: variants differ in what is computed, not in where it goes; use --set")
    return path, [part.strip() for part in _split(values)]


def _split(text: str) -> list[str]:
    """At the commas; those inside brackets or quotes belong to a value."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other sweeps out of it. Raises LinearizeError where one is running there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w", encoding="utf-8") as file:
        why = "another sweep is running there. Wait for it, end it, or set another output.folder."
        lock(file, LinearizeError(f"{folder}: {why}"))
        yield


def _open(folder: Path, base: Recipe) -> None:
    """Writes down which recipe the folder is of, or checks that it is this one, the grid aside."""
    path, now = folder / BASE_FILE, json.loads(json.dumps(settings_of(base)))
    before = _read(path)
    changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    if before and changed:
        raise TrainingError(
            f"{folder} holds a sweep with other settings of {', '.join(changed)}. Delete it, or set another "
            "output.folder."
        )
    write_json(path, now, allow_nan=False)


def _convert(variant: Variant, folder: Path, shared: SharedTokens, *, keep_models: bool) -> None:
    """Converts one variant and writes down what came of it, an error too. Minutes add up over interruptions."""
    path, target, started = folder / f"{variant.name}.json", variant.recipe.output_folder, time.monotonic()
    record = {"grid": variant.grid, "minutes": _read(path).get("minutes", 0.0), "error": None, "figures": None}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # the report says what this variant took
    try:
        if not (target / "report.json").exists():  # else it was stopped after its last step
            convert(variant.recipe, tokens=shared)
        figures = figures_of(load_report(target))
        if not keep_models:
            _drop_models(target)
        record["figures"] = figures
    except (LinearizeError, RuntimeError, OSError) as error:  # RuntimeError: out of memory, among others
        record["error"] = f"{type(error).__name__}: {error}"
        print(f"failed: {record['error']}", flush=True)
    finally:
        record["minutes"] += (time.monotonic() - started) / 60
        write_json(path, record, allow_nan=False)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _drop_models(target: Path) -> None:
    for path in target.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _records(folder: Path, variants: Sequence[Variant]) -> list[dict]:
    """What came of the variants of this grid, in order, then of those of grids before it."""
    names = [f"{variant.name}.json" for variant in variants]
    others = sorted(p.name for p in folder.glob("*.json") if p.name not in (BASE_FILE, *names))
    return [record for name in (*names, *others) if (record := _read(folder / name))]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
