"""Writes the Hugging Face folder: all of it, verified by reloading, or nothing.

The folder is built under a temporary name beside its place, loaded again and compared, and only then renamed.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from .errors import ExportError
from .loading import DTYPES
from .modeling_linearized import LINEARIZED

VERIFY_TOKENS = 32  # beyond window and sinks, so that the far term is compared too


def check_free(folder: Path, *, force: bool) -> None:
    """Raises ExportError if `folder` holds a finished conversion (unless forced) or anything else."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return
    if not _is_ours(folder):
        raise ExportError(f"{folder} exists and is not a conversion of ours; choose another output.folder")
    if not force:
        raise ExportError(
            f"{folder} holds a finished conversion. Keep it and set another output.folder, or replace it with --force."
        )


def export(model, tokenizer, folder: Path, *, dtype: str, files: dict[str, str | Path]) -> None:
    """Saves `model` (LoRA merged) and `tokenizer` to `folder`.

    dtype: auto (as the model is) or a dtype's name; the linear attention stays float32.
    files: further files by name, as text or as a path to copy. Replaces a conversion that is already in `folder`.
    Raises ExportError when the disk is full, or when the folder does not give the same logits again.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(model, tokenizer, temporary, dtype, files)
        _verify(model, temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise ExportError(
            f"{folder} could not be written: {error}. Nothing was left there; the run's checkpoints stay. Make room or "
            "mend the place, then give the same command again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(model, tokenizer, folder, dtype, files) -> None:
    if dtype != "auto" and model.dtype != DTYPES[dtype]:
        _cast(model, DTYPES[dtype])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")


def _cast(model, dtype) -> None:
    """Casts the base model's weights in place; buffers and the linear attention keep their dtype."""
    for name, parameter in model.named_parameters():
        if ".linear_attn." not in name:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


@torch.no_grad()
def _verify(model, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    try:
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    except ValueError as error:
        raise ExportError(
            f"{folder} does not load again: {error}. This is a bug of linearize; please report it with the recipe."
        ) from error
    generator = torch.Generator().manual_seed(0)
    vocabulary, spec = model.config.get_text_config().vocab_size, model.config.linear_attention
    length = spec["window"] + spec["sinks"] + VERIFY_TOKENS
    tokens = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
    before, after = (m(input_ids=tokens, use_cache=False).logits.float() for m in (model.eval(), again))
    if not torch.equal(before, after):
        difference = (before - after).abs().max().item()
        raise ExportError(
            f"{folder} loads to another model: logits differ by up to {difference:.3g}. This is a bug of linearize; "
            "please report it with the recipe."
        )


def _is_ours(folder: Path) -> bool:
    config = folder / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == LINEARIZED
    except (OSError, ValueError, AttributeError):  # no file, no text, no JSON or not an object
        return False
