"""The report card of a recipe: which variants are measured, on what, and lm-eval's tasks if it asks for some."""

from linearize.errors import ModelError
from linearize.run_log import peak_memory_bytes
from linearize.variants import report_variants
from linearize_eval.baseline import with_baseline
from linearize_eval.memory import forward_tokens, kv_bytes, state_bytes
from linearize_eval.report import measure_report


def measure_card(model, tokenizer, recipe, *, rows, text, baseline, log) -> dict:
    """The report (see `linearize_eval.report.measure_report`) of a converted model by recipe.evaluate.

    rows: held-out token ids [N, T], int64. text: name and rows of `evaluate.text`, or None. baseline: the report of
    `evaluate.baseline`, or None; where it was measured on other texts the untrained row stays, and the card says why.
    log: a RunLog.
    """
    settings = recipe.evaluate
    model.eval()
    variants, notes = report_variants(model)
    report = measure_report(
        model, tokenizer, variants=variants, notes=notes, rows=rows, text=text, window=recipe.attention.window,
        recall_distances=settings.recall_distances, key_recall_samples=settings.key_recall_samples,
        key_recall_pairs=settings.key_recall_pairs, state_bytes=lambda length: state_bytes(model, length),
        kv_bytes=lambda length: kv_bytes(model, length),
        batch_tokens=forward_tokens(model, least=recipe.run.micro_batch * recipe.data.sequence_length),
    )  # fmt: skip
    if baseline is not None:
        try:
            report = with_baseline(report, baseline, settings.baseline)
        except ModelError as error:  # known only now; the card is worth more than none
            report["left_out"].append(str(error))
    report["tasks"] = _run_tasks(model, tokenizer, settings, variants, log)
    report["memory_peak_bytes"] = peak_memory_bytes()
    return report


def _run_tasks(model, tokenizer, settings, variants, log) -> dict:
    if not settings.tasks:
        return {}
    from linearize_eval.harness import evaluate_model, format_results

    results, batch_size = {}, "auto" if model.device.type == "cuda" else 8
    for name in ("teacher", "converted"):
        with variants[name]():
            results[name] = evaluate_model(
                model, tokenizer, tasks=settings.tasks, include_path=settings.task_path, limit=settings.task_limit,
                batch_size=batch_size,
            )  # fmt: skip
        log.say(f"{name}:\n{format_results(results[name])}")
    return results
