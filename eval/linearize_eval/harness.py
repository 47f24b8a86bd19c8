"""lm-eval's tasks on a converted model, through lm-eval's own Python interface.

The same figures as `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True,softmax_dtype=float32`:
same prompts, same defaults, same scoring; only the batch size may differ, and with it the last digits. The log-softmax
is in float32 whatever the model's dtype: in bfloat16 it would be off by more than answers differ.
"""

import copy
import difflib
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from linearize.errors import DataError, LinearizeError
from linearize_eval.json_values import finite

NUM_SUGGESTIONS = 3
LARGEST_BATCH = 256  # of "auto", which halves it until a batch of the longest request fits
DRAWS = 1000  # for the error of a perplexity; lm-eval's 100,000 take minutes for a second digit of it
# lm-eval warns of these on every run that hands it a model object or a task with its own data loader.
HARMLESS_WARNINGS = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
    "using the following custom_kwargs",
    "Custom kwargs can be passed to `--metadata`",
)


def evaluate_folder(
    folder: str | Path,
    *,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 8,
    device: str = "auto",
    dtype: str = "auto",
    num_fewshot: int | None = None,
) -> dict:
    """Runs lm-eval tasks on the model exported to `folder`, or on any model that a recipe may name, as its teacher.

    `device` and `dtype` as in `linearize.load`, but that dtype "auto" is the saved one on a CPU too, as it is
    for lm-eval. The other arguments, the result and the errors are those of `evaluate_model`.

    Raises ModelError if there is no model in `folder`.
    """
    from linearize.loading import load_any, locate, read_config

    locate(str(folder))  # a wrong name is known now, not after lm-eval's tasks have been listed
    _require_lm_eval()
    task_manager, names = find_tasks(tasks, include_path=include_path, pretrained=str(folder))
    if dtype == "auto" and (Path(folder) / "config.json").is_file():
        dtype = read_config(Path(folder)).get("dtype") or "auto"
    model, tokenizer = load_any(folder, device=device, dtype=dtype)
    return _evaluate(model, tokenizer, names, task_manager, limit, batch_size, num_fewshot)


def evaluate_model(
    model,
    tokenizer,
    *,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 8,
    num_fewshot: int | None = None,
) -> dict:
    """Runs lm-eval tasks on a causal LM in memory, which is left as it was.

    Args:
        model, tokenizer: a Hugging Face causal LM and its tokenizer.
        tasks: names of tasks, groups or tags of lm-eval, with * and ? allowed, or paths of task files.
        include_path: folder with task files of your own; they win over lm-eval's of the same name.
        limit: only the first `limit` documents of each task (a share of them if below 1).
        batch_size: requests a forward, or "auto": as many as memory holds, up to LARGEST_BATCH.
        num_fewshot: examples in each prompt, instead of the task's own number.

    Returns lm-eval's results as JSON values (a NaN is None): "results" {task: {metric: value}}, "n-shot", ...
    Raises LinearizeError if lm-eval is not installed, DataError if a task is unknown or its data is missing.
    """
    _require_lm_eval()
    pretrained = getattr(model.config, "_name_or_path", "")  # no attribute of a converted one in transformers 5.17
    task_manager, names = find_tasks(tasks, include_path=include_path, pretrained=pretrained)
    return _evaluate(model, tokenizer, names, task_manager, limit, batch_size, num_fewshot)


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise LinearizeError('tasks need lm-eval, which is not installed: pip install "linearize[eval]"')


def find_tasks(tasks: Sequence[str], *, include_path: str | Path | None, pretrained: str):
    """(lm-eval's TaskManager, exact names of `tasks`): from `include_path` alone if it has them all.

    lm-eval's own tasks are searched, which takes seconds, only for a name that `include_path` lacks.
    `pretrained` is what tasks that fit their texts to a tokenizer load it from.

    Raises DataError if `include_path` is no folder, or for the first name found nowhere.
    """
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise DataError("no tasks to run: name at least one, for example lambada_openai")
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"include path {include_path} is not a folder; it must hold lm-eval task files")
    metadata = {"pretrained": pretrained}
    include = None if include_path is None else str(include_path)
    for include_defaults in (False, True):
        with _quiet_harness():
            manager = TaskManager(include_path=include, include_defaults=include_defaults, metadata=metadata)
        found = {task: _matches(manager, task) for task in tasks}
        missing = [task for task, names in found.items() if not names]
        if not missing:
            return manager, list(dict.fromkeys(name for names in found.values() for name in names))
    near = difflib.get_close_matches(missing[0], manager.all_tasks, n=NUM_SUGGESTIONS)
    where = f" or in {include_path}" if include_path is not None else ""
    hint = f"; the nearest names are {', '.join(near)}" if near else "; `lm_eval ls tasks` lists them"
    raise DataError(f"no task {missing[0]!r} in lm-eval{where}{hint}")


def _matches(manager, task: str) -> list[str]:
    """Names of `manager`'s tasks that `task`, a name or pattern, stands for, or the path of a task file."""
    if task.endswith(".yaml"):
        return [str(Path(task).resolve())] if Path(task).is_file() else []
    return manager.match_tasks([task])


def _evaluate(model, tokenizer, names, task_manager, limit, batch_size, num_fewshot) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    training = [module for module in model.modules() if module.training]
    makes_cache, model.config.use_cache = model.config.use_cache, False  # scores need none; generating asks for its own
    try:
        with _quiet_harness():
            # lm-eval gives a tokenizer without a padding token one: the caller's must stay as it is
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                max_batch_size=LARGEST_BATCH,
                softmax_dtype="float32",
                backend="causal",
            )
            results = simple_evaluate(
                model=lm,
                tasks=names,
                task_manager=task_manager,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                bootstrap_iters=DRAWS,
                log_samples=False,
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"the data of {', '.join(names)} could not be read ({error}). Without internet, use tasks that "
            "read local files, or fill the data sets' cache first on a machine with internet"
        ) from error
    finally:
        model.config.use_cache = makes_cache
        for module in training:
            module.training = True
    return finite(json.loads(json.dumps(results, default=handle_non_serializable)))


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """lm-eval's log inside: warnings only, and not those that mean nothing here."""
    logger = logging.getLogger("lm_eval")
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: not any(part in record.getMessage() for part in HARMLESS_WARNINGS))
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task: its `value`, None if not finite, and standard error, None if there is none."""

    task: str
    metric: str
    value: float | None
    error: float | None
    num_fewshot: int | str
    num_documents: int | str


def task_figures(results: dict) -> list[TaskFigure]:
    """Every figure in the results of `evaluate_model`, in order."""
    figures = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float | None):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            figures.append(
                TaskFigure(
                    task=metrics.get("alias", task),
                    metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                    value=value,
                    error=error if isinstance(error, int | float) else None,
                    num_fewshot=results.get("n-shot", {}).get(task, ""),
                    num_documents=results.get("n-samples", {}).get(task, {}).get("effective", ""),
                )
            )
    return figures


def format_results(results: dict) -> str:
    """The results of `evaluate_model` as an aligned table: task, metric, value, standard error, documents."""
    lines = [("task", "metric", "value", "± std. error", "n-shot", "documents")]
    for figure in task_figures(results):
        value = "not finite" if figure.value is None else f"{figure.value:.4f}"
        error = "" if figure.error is None else f"{figure.error:.4f}"
        counts = str(figure.num_fewshot), str(figure.num_documents)
        lines.append((figure.task, figure.metric, value, error, *counts))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    text = []
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(left + right).rstrip())
    return "\n".join(text)
