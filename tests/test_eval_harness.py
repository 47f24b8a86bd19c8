"""lm-eval on a tiny model: the same figures as lm-eval by path, and clear errors."""

import importlib.util
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import linearize
from linearize.architecture import linearize_
from linearize.errors import DataError, LinearizeError, ModelError
from linearize.export import export
from linearize.recipe import AttentionSettings, FeatureMapSettings

lm_eval = pytest.importorskip("lm_eval")

from linearize_eval import harness  # noqa: E402
from linearize_eval.harness import evaluate_folder, evaluate_model, find_tasks, format_results  # noqa: E402

WORDS = "sky grass blood snow is blue green red white the colour of what and cold warm".split()
CHOICES = ["blue", "green", "red", "white"]
SUBJECTS = ["sky", "grass", "blood", "snow"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random Llama and its tokenizer, which has no padding token, saved."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Two tasks over local files: four choices, and the likelihood of a last word."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"subject": f"{subject} and {other}", "label": label}
        for label, subject in enumerate(SUBJECTS)
        for other in SUBJECTS
    ]
    data = folder / "documents.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "the colour of {{subject}} is",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "tiny_choice": {
            "output_type": "multiple_choice",
            "doc_to_target": "label",
            "doc_to_choice": CHOICES,
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        "tiny_word": {
            "output_type": "loglikelihood",
            "doc_to_target": " {{['blue', 'green', 'red', 'white'][label]}}",
            "metric_list": [{"metric": "acc", **mean}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def converted_folder(model_folder, tmp_path_factory):
    """The tiny model converted and exported in bfloat16."""
    model, tokenizer = load(model_folder)
    folder = tmp_path_factory.mktemp("exported") / "model"
    linearize_(model, AttentionSettings(window=4, sinks=1, feature_map=FeatureMapSettings(dim=4)))
    export(model, tokenizer, folder, dtype="bfloat16", files={})
    return folder


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(autouse=True)
def own_tasks_only(monkeypatch):
    """lm-eval's own tasks take seconds to list and are not asked for here."""
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__

    def quick(self, *args, include_defaults, **kwargs):
        original(self, *args, include_defaults=False, **kwargs)

    monkeypatch.setattr(TaskManager, "__init__", quick)


def plain_lm_eval(model_folder, task_folder, **settings) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_folder), "trust_remote_code": True, "softmax_dtype": "float32"},
        tasks=["tiny_choice", "tiny_word"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        batch_size=8,
        device="cpu",
        log_samples=False,
        **settings,
    )["results"]


@pytest.mark.parametrize("settings", [{}, {"limit": 5}, {"num_fewshot": 2}])
def test_figures_equal_those_of_plain_lm_eval(model_folder, task_folder, settings):
    expected = plain_lm_eval(model_folder, task_folder, **settings)
    model, tokenizer = load(model_folder)
    tasks = ["tiny_choice", "tiny_word"]
    results = evaluate_model(model, tokenizer, tasks=tasks, include_path=task_folder, **settings)
    assert results["results"] == expected
    assert 0 < results["results"]["tiny_choice"]["acc,none"] < 1
    assert json.loads(json.dumps(results)) == results
    documents = settings.get("limit", 16)
    assert results["n-samples"]["tiny_choice"] == {"original": 16, "effective": documents}


def test_a_converted_folder_scores_as_in_plain_lm_eval(converted_folder, task_folder):
    results = evaluate_folder(converted_folder, tasks=["tiny_*"], include_path=task_folder, device="cpu")
    assert results["results"] == plain_lm_eval(converted_folder, task_folder)
    assert results["config"]["model_dtype"] == "torch.bfloat16"


def test_the_batch_may_be_found_and_the_error_of_a_perplexity_takes_few_draws(model_folder, task_folder, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    seen, real = [], HFLM.__init__

    def noted(self, *args, **kwargs):
        seen.append((kwargs["batch_size"], kwargs["max_batch_size"], kwargs["softmax_dtype"]))
        real(self, *args, **kwargs)

    def draws(metric, bootstrap_iters):
        seen.append(bootstrap_iters)
        return None

    monkeypatch.setattr(HFLM, "__init__", noted)
    monkeypatch.setattr("lm_eval.evaluator_utils.stderr_for_metric", draws)
    model, tokenizer = load(model_folder)
    results = evaluate_model(model, tokenizer, tasks=["tiny_word"], include_path=task_folder, batch_size="auto")
    monkeypatch.undo()
    again = evaluate_model(model, tokenizer, tasks=["tiny_word"], include_path=task_folder)
    assert results["results"]["tiny_word"]["acc,none"] == again["results"]["tiny_word"]["acc,none"]
    assert seen == [("auto", 256, "float32"), 1000]


def test_another_dtype_may_be_asked_for(converted_folder, task_folder):
    settings = {"tasks": ["tiny_word"], "include_path": task_folder, "limit": 2, "device": "cpu"}
    results = evaluate_folder(converted_folder, dtype="float32", **settings)
    assert results["config"]["model_dtype"] == "torch.float32"


def test_model_and_tokenizer_are_left_as_they_were(model_folder, task_folder):
    model, tokenizer = load(model_folder)
    model.train()
    evaluate_model(model, tokenizer, tasks=["tiny_word"], include_path=task_folder, limit=2)
    assert tokenizer.pad_token is None
    assert all(module.training for module in model.modules())
    assert model.config.use_cache


def test_scores_are_found_without_a_cache(converted_folder, task_folder):
    model, tokenizer = linearize.load(converted_folder, device="cpu")
    settings = {"tasks": ["tiny_word"], "include_path": task_folder}
    expected = evaluate_model(model, tokenizer, **settings)["results"]

    def refused():
        raise AssertionError("a cache was made")

    model.make_cache = refused
    with pytest.raises(AssertionError, match="a cache was made"):
        model(torch.ones(1, 4, dtype=torch.long))
    assert evaluate_model(model, tokenizer, **settings)["results"] == expected


def test_harmless_warnings_are_kept_back_and_others_shown(model_folder, task_folder, capfd):
    model, tokenizer = load(model_folder)
    before = logging.getLogger("lm_eval").handlers
    evaluate_model(model, tokenizer, tasks=["tiny_word"], include_path=task_folder, limit=2)
    shown = capfd.readouterr().err
    assert "pretrained" not in shown and "custom" not in shown.lower()
    with harness._quiet_harness():
        logging.getLogger("lm_eval.models").warning("truncated 7 tokens")
        logging.getLogger("lm_eval.models").info("chatter")
    shown = capfd.readouterr().err
    assert "truncated 7 tokens" in shown and "chatter" not in shown
    assert logging.getLogger("lm_eval").handlers == before


def test_a_task_file_may_be_given_by_path(task_folder):
    _, names = find_tasks([str(task_folder / "tiny_word.yaml")], include_path=None, pretrained="x")
    assert names == [str(task_folder / "tiny_word.yaml")]


def test_results_are_written_as_a_table(model_folder, task_folder):
    model, tokenizer = load(model_folder)
    results = evaluate_model(model, tokenizer, tasks=["tiny_choice", "tiny_word"], include_path=task_folder)
    text = format_results(results)
    header, _, *lines = text.splitlines()
    assert header.split()[:3] == ["task", "metric", "value"]
    assert len(lines) == 3
    for line in lines:
        task, metric, value, error, num_fewshot, documents = line.split()
        figures = results["results"][task]
        assert value == f"{figures[f'{metric},none']:.4f}"
        assert error == f"{figures[f'{metric}_stderr,none']:.4f}"
        assert (num_fewshot, documents) == ("0", "16")


def test_a_figure_that_is_not_finite_is_json_and_shown(model_folder, task_folder, monkeypatch):
    results = {"results": {"tiny_word": {"perplexity,none": float("nan")}}}
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: results)
    results = evaluate_model(*load(model_folder), tasks=["tiny_word"], include_path=task_folder)
    assert results == {"results": {"tiny_word": {"perplexity,none": None}}}
    assert format_results(results).splitlines()[-1].split() == ["tiny_word", "perplexity", "not", "finite"]


def test_an_unknown_task_names_the_nearest(model_folder, task_folder):
    model, tokenizer = load(model_folder)
    with pytest.raises(DataError, match="no task 'tiny_chioce'.*nearest names are tiny_choice"):
        evaluate_model(model, tokenizer, tasks=["tiny_word", "tiny_chioce"], include_path=task_folder)
    with pytest.raises(DataError, match="no tasks to run"):
        evaluate_model(model, tokenizer, tasks=[], include_path=task_folder)
    with pytest.raises(DataError, match="is not a folder"):
        evaluate_model(model, tokenizer, tasks=["tiny_word"], include_path=task_folder / "nowhere")


def test_missing_data_is_a_plain_error(model_folder, tmp_path):
    task = {
        "task": "lost",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "lost.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "a",
        "doc_to_target": "b",
    }
    (tmp_path / "lost.yaml").write_text(json.dumps(task))
    model, tokenizer = load(model_folder)
    with pytest.raises(DataError, match="the data of lost could not be read"):
        evaluate_model(model, tokenizer, tasks=["lost"], include_path=tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path, task_folder):
    with pytest.raises(ModelError, match="has no config.json"):
        evaluate_folder(tmp_path, tasks=["tiny_word"], include_path=task_folder)


def test_without_lm_eval_the_error_says_what_to_install(model_folder, task_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(LinearizeError, match=r'pip install "linearize\[eval\]"'):
        evaluate_folder(model_folder, tasks=["tiny_word"], include_path=task_folder)
