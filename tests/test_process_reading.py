"""`linearize process` reads prompts: those of like length together, what they all begin with once."""

import pytest
from test_process import TEXTS, folder, lines, run, write  # noqa: F401 (a fixture)

from linearize import process as process_module
from linearize.generation import generate_text
from linearize.process import groups_of_like_length

LONG = "the town of the old king, where a river runs: " * 3


@pytest.fixture
def reads(monkeypatch):
    """The shapes [B, T] of what is read, and whether after a state."""
    calls, read = [], process_module.read

    def noted(model, ids, mask=None, *, state=None):
        calls.append((*ids.shape, state is not None))
        return read(model, ids, mask, state=state)

    monkeypatch.setattr(process_module, "read", noted)
    return calls


def test_groups_pad_at_most_half(monkeypatch):
    monkeypatch.setattr(process_module, "TOKENS_AT_ONCE", 40)
    prompts = [([0] * n, n) for n in (30, 3, 5, 6, 7, 31, 100, 6, 6, 6, 6, 6, 6, 6)]
    groups = [[n for _, n in group] for group in groups_of_like_length(prompts)]
    assert sorted(n for g in groups for n in g) == sorted(n for _, n in prompts)
    for group in groups:
        assert group[-1] <= 2 * group[0] and (len(group) == 1 or group[-1] * len(group) <= 40)
    assert [[g[0], g[-1]] for g in groups] == [[3, 6], [6, 7], [30, 30], [31, 31], [100, 100]]


def test_prompts_are_read_together(folder, tmp_path, reads):  # noqa: F811
    source = write(tmp_path / "in.jsonl", [{"text": "so it is " + "a" * i} for i in range(8)])
    run(folder, source, tmp_path / "out.jsonl", batch=8)
    assert reads == [(8, 19, False)]


@pytest.mark.parametrize("prefix", [LONG, ""])
def test_what_all_prompts_begin_with_is_read_once(folder, tmp_path, reads, prefix):  # noqa: F811
    """By an own --prefix, or found; nothing is padded after it, which would narrow the window."""
    template = "{text} is" if prefix else LONG + "{text} is"
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in [*TEXTS, "no", "we"]])
    run(folder, source, tmp_path / "out.jsonl", template=template, prefix=prefix, batch=8)
    texts = [LONG + f"{text} is" for text in [*TEXTS, "no", "we"]]
    assert [r["output"] for r in lines(tmp_path / "out.jsonl")] == generate_each(folder, texts)
    assert reads[0] == (1, len(LONG), False) and all(after for *_, after in reads[1:]), "the beginning, once"
    assert (3, 5, True) in reads, "those of one length together"


def test_a_prompt_that_begins_otherwise(folder, tmp_path, reads):  # noqa: F811
    texts = [LONG + "so", LONG + "no", LONG + "it was", LONG[:90] + "we", LONG + "a", "so it is " * 20, "the king"]
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    run(folder, source, tmp_path / "out.jsonl", template="{text}", batch=2)
    assert [r["output"] for r in lines(tmp_path / "out.jsonl")] == generate_each(folder, texts)
    assert [n for b, n, after in reads if not after and n > 80] == [len(LONG), 90, 180], "the beginning became shorter"


def generate_each(folder, texts):  # noqa: F811
    return [generate_text(folder, prompts=[x], max_new_tokens=20, device="cpu")[0] for x in texts]
