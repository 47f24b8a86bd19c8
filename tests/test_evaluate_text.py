"""evaluate.text: a file cut into rows, refused early where it will not do, measured in the report card."""

import pytest
import torch
from test_export import CALIBRATED_ONLY, REPORT, make_tokenizer, save_model, save_recipe, save_text

from linearize.convert import convert
from linearize.errors import DataError
from linearize.recipe import load_recipe
from linearize.text_rows import read_text_rows
from linearize_eval import perplexity
from linearize_eval.report import load_report


def test_rows_are_the_files_tokens_in_order(tmp_path):
    path, tokenizer = tmp_path / "a.txt", make_tokenizer()
    path.write_text("the old king runs to town", encoding="utf-8")  # 25 tokens
    rows = read_text_rows(path, tokenizer, length=8, count=9)
    assert rows.shape == (3, 8) and rows.dtype == torch.int64
    assert tokenizer.decode(rows.flatten()) == "the old king runs to tow"
    assert torch.equal(read_text_rows(path, tokenizer, length=8, count=2), rows[:2])
    problems = {"missing.txt": "missing.txt cannot be read", "a.txt": "has 25 tokens, less than one row"}
    for bad, words in problems.items():
        with pytest.raises(DataError, match=words):
            read_text_rows(tmp_path / bad, tokenizer, length=26, count=1)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_text_rows(tmp_path / "b.txt", tokenizer, length=8, count=1)


def test_convert_measures_the_text_in_batches(tmp_path, monkeypatch):
    model, text, wiki = save_model(tmp_path / "m"), save_text(tmp_path / "t.jsonl"), tmp_path / "wiki.txt"
    wiki.write_text("a king sees the red river " * 20, encoding="utf-8")  # 520 tokens: 10 rows, 8 asked for
    changes = {**CALIBRATED_ONLY, **REPORT, "evaluate.text": str(wiki), "run.micro_batch": 4}
    missing = save_recipe(tmp_path, model, text, **{**changes, "evaluate.text": str(tmp_path / "no.txt")})
    with pytest.raises(DataError, match="no.txt"):
        convert(load_recipe(missing))
    assert not (tmp_path / "out.work").exists()
    batches, real = [], perplexity.nll_and_kl

    def counted(states, *rest, **head):
        batches.append(len(states))
        return real(states, *rest, **head)

    monkeypatch.setattr(perplexity, "nll_and_kl", counted)
    report = load_report(convert(load_recipe(save_recipe(tmp_path, model, text, **changes))))
    assert report["meta"]["text"] == {"name": "wiki.txt", "num_rows": 8, "row_tokens": 48}
    assert set(batches) == {2, 4}, "held-out rows are two, those of the text eight"
    teacher, converted, _, _, window = report["variants"]
    assert teacher["kl"] == 0 and converted["kl"] > 0 and window["kl"] > 0
    assert converted["text"]["perplexity"] != teacher["text"]["perplexity"] > 1
    assert converted["text"]["buckets"][0]["stop"] == 8
