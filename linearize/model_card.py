"""The README.md of an exported folder: what the model is, how to load it, and the figures measured on it."""

from pathlib import PurePath

from .recipe import Recipe, to_yaml
from .train import StageResult

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [linearize, linear-attention]
---
# {name}

{base}, converted by [linearize]: its softmax attention was replaced by exact attention on the newest {window}
tokens{sinks}{far}.
Its memory does not grow with the text{kept}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)  # not needed after `import linearize`
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

## Training

{training}

## Measured

{report}

## Recipe

```yaml
{recipe}```
"""


def model_card(recipe: Recipe, results: list[StageResult], report: str | None, *, window: int, map_dim: int) -> str:
    """Markdown; `report` is the report card as markdown, or None where the recipe asked for none.

    window, map_dim: of the model, for which the recipe's may only stand (equal_window, null).
    """
    attention = recipe.attention
    keep = attention.keep_softmax
    kept = [f"layers {', '.join(map(str, keep.layers))}"] if keep.layers else []
    kept += [f"kv heads {', '.join(f'{layer}.{head}' for layer, head in keep.heads)}"] if keep.heads else []
    return _CARD.format(
        name=recipe.name,
        base=PurePath(recipe.model.id).name,
        window=window,
        sinks=f" and the first {attention.sinks}" if attention.sinks else "",
        far=_far(attention.feature_map.name, map_dim) if recipe.has_far_term else ", which is all it sees: a baseline",
        kept=f", but for {' and '.join(kept)}, which stayed softmax" if kept else "",
        folder=recipe.output_folder,
        training="\n".join(_stage_line(r) for r in results) or "None: calibrated only.",
        report=report or "Nothing: the recipe asked for no report card (evaluate.sequences: 0).",
        recipe=to_yaml(recipe),
    )


def _far(name: str, map_dim: int) -> str:
    kind = {"taylor": "second-order ", "hedgehog": ""}[name]
    return f", plus {kind}linear attention ({name}, dimension {map_dim}) on everything between"


def _stage_line(result: StageResult) -> str:
    return (
        f"- {result.name}: {result.num_tokens:,} tokens in {result.num_steps} steps, held-out loss "
        f"{result.first_error:.4g} before, {result.best_error:.4g} at step {result.best_step}"
    )
