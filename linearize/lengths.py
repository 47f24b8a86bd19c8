"""How long texts may be for a model, how long a recipe's stages take them, and what does not go together."""

import math
from collections.abc import Iterator

SHORTEST_REPEATING = 128  # tokens of a row that repeats a passage


def max_positions(model) -> float:
    """How many tokens a model was made for, by its config; infinity where that does not say."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or math.inf


def length_of(recipe, stage) -> int:
    """Tokens a sequence in a stage: its own setting, or data.sequence_length."""
    return recipe.data.sequence_length if stage.sequence_length is None else stage.sequence_length


def rows_a_forward(recipe, stage) -> int:
    """Sequences a forward pass of a stage: its own setting, or as many tokens as `run.micro_batch` has; at least 1."""
    if stage.micro_batch is not None:
        return stage.micro_batch
    return max(1, recipe.run.micro_batch * recipe.data.sequence_length // length_of(recipe, stage))


def length_problems(recipe, window: int) -> Iterator[str]:
    """What is wrong with the lengths of a recipe whose exact attention is `window` tokens and the sinks."""
    exact, lengths = window + recipe.attention.sinks, {}
    if recipe.calibrate.sequences and recipe.has_far_term:
        lengths["data.sequence_length"] = recipe.data.sequence_length
    for name, stage in recipe.trained.items():
        setting = "data.sequence_length" if stage.sequence_length is None else f"{name}.sequence_length"
        length = lengths[setting] = length_of(recipe, stage)
        forward = rows_a_forward(recipe, stage) * length
        if stage.batch_tokens < forward:
            rows = "run.micro_batch" if stage.micro_batch is None else f"{name}.micro_batch"
            yield (
                f"{name}.batch_tokens: {stage.batch_tokens} must be at least one forward pass, {forward} by "
                f"{rows} and {setting}"
            )
        if stage.sequence_length is not None and not recipe.data.packing:
            yield f"{name}.sequence_length: needs data.packing; without it data.sequence_length cuts the texts"
        if stage.repeated_passages and length < SHORTEST_REPEATING:
            yield (
                f"{name}.repeated_passages: needs sequences of {SHORTEST_REPEATING} tokens or more; {setting} is "
                f"{length}; make them longer or set it to 0"
            )
    for setting, length in lengths.items():
        if exact >= length:
            yield (
                f"attention.window: with sinks it covers {exact} tokens, all of {setting} ({length}), so nothing "
                "would be learned; make the window smaller or the sequences longer"
            )
    if recipe.evaluate.sequences and exact >= recipe.evaluate.sequence_length:
        yield (
            f"evaluate.sequence_length: must be more than attention.window and sinks ({exact}), else the linear "
            f"attention is never used; is {recipe.evaluate.sequence_length}"
        )
