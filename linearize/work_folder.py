"""The folder of work in progress: made, or checked to belong to the recipe that would go on from it."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from .errors import ExportError, TrainingError
from .recipe import Recipe
from .whole_folder import write_json


def open_work(work: Path, recipe: Recipe, *, force: bool) -> None:
    """Makes the work folder, or checks that what was computed in it belongs to this recipe."""
    path, now = work / "settings.json", settings_of(recipe)
    if force:
        shutil.rmtree(work, ignore_errors=True)
    if path.exists() and (work / "calibrated.safetensors").exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        free = {"evaluate", "choice"} if (work / "finetune.pt").exists() else {"evaluate", "choice", "finetune"}
        changed = sorted(k for k in {*before, *now} - free if before.get(k) != now.get(k))
        if changed:
            raise TrainingError(
                f"{work} holds an unfinished run with other settings of {', '.join(changed)}. Start over with --force, "
                "or set another output.folder."
            )
        if before["evaluate"] != now["evaluate"] or before["choice"] != now["choice"]:
            shutil.rmtree(work / "report", ignore_errors=True)
        if before["choice"] != now["choice"]:
            (work / "finetune.pt").unlink(missing_ok=True)
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    except OSError as error:
        raise ExportError(f"{work} could not be made: {error}. Choose another output.folder.") from error


def settings_of(recipe: Recipe) -> dict:
    """The sections that decide what the training computes, the report card's, and what is chosen after matching."""
    names = ("model", "attention", "data", "calibrate", "match", "finetune", "evaluate")
    settings = {**{name: asdict(getattr(recipe, name)) for name in names}, "run.seed": recipe.run.seed}
    keep = settings["attention"]["keep_softmax"]
    settings["choice"] = {name: keep.pop(name) for name in ("count", "by", "unit")}
    settings["choice"]["distances"] = recipe.rank_distances
    return settings
