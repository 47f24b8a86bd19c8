"""Loads teachers (hub id, folder, GGUF file, file in an installed package) and exported folders."""

import json
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError

from .errors import LinearizeError, ModelError
from .gguf_cache import load_kept
from .sources import find_package_files

# What transformers, safetensors and the GGUF reader raise on files that are missing, damaged or not for them.
LOADING_ERRORS = (OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError, SafetensorError, struct.error)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(folder, *, dtype: str = "auto", device: str = "auto"):
    """(model, tokenizer) of an exported folder, in eval mode. Raises ModelError where it is not one.

    dtype: auto (as saved; float32 on a CPU, which computes no faster in less), float32, bfloat16 or float16.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import modeling_linearized

    folder = Path(folder)
    config = read_config(folder)
    if config.get("model_type") != modeling_linearized.LINEARIZED:
        raise ModelError(
            f"{folder} holds a {config.get('model_type')} model, not a converted one. Convert it first: "
            f"linearize convert {folder}"
        )
    target = pick_device(device)
    modeling_linearized.register()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(dtype, target))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except LOADING_ERRORS as error:
        raise ModelError(f"{folder} does not load: {error}") from error
    return model.to(target).eval(), tokenizer


def load_any(source, *, dtype: str = "auto", device: str = "auto"):
    """(model, tokenizer) of an exported folder, or of whatever else a recipe's model.id may name, to compare with."""
    from .modeling_linearized import LINEARIZED
    from .recipe import ModelSettings

    folder = Path(source)
    if (folder / "config.json").is_file() and read_config(folder).get("model_type") == LINEARIZED:
        return load(folder, dtype=dtype, device=device)
    return load_teacher(ModelSettings(id=str(source), dtype=dtype), device=pick_device(device))


def load_teacher(settings, *, device: torch.device):
    """(model, tokenizer) to convert, by the recipe's `model` section. Raises ModelError where it cannot be had."""
    source = locate(settings.id)
    dtype = pick_dtype(settings.dtype, device, gguf=source.gguf is not None)

    def load_from(name, gguf):
        return _load_pretrained(ModelSource(name, gguf), settings, dtype)

    if source.gguf is None:
        model, tokenizer = load_from(source.name, None)
    else:
        model, tokenizer = load_kept(Path(source.name, source.gguf), dtype, load_from, errors=LOADING_ERRORS)
    return model.to(device).eval(), tokenizer


def _load_pretrained(source: "ModelSource", settings, dtype):
    """(model, tokenizer), by transformers. Raises ModelError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = source.options(settings.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source.name, dtype=dtype, output_loading_info=True, **options, **source.dequantised()
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"model.id = {settings.id!r} does not load: {error}") from error
    if info["missing_keys"]:
        raise ModelError(
            f"model.id = {settings.id!r} lacks {len(info['missing_keys'])} weights of a {type(model).__name__}, for "
            f"example {sorted(info['missing_keys'])[0]}. Download or save it again."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        if source.gguf is None:
            raise ModelError(f"{settings.id} is quantised; convert the unquantised model")
        model.hf_quantizer.remove_quantization_config(model)
    return model, tokenizer


def load_teacher_config(settings):
    """The model's config alone, without its weights."""
    from transformers import AutoConfig

    source = locate(settings.id)
    try:
        return AutoConfig.from_pretrained(source.name, **source.options(settings.revision))
    except LOADING_ERRORS as error:
        raise ModelError(f"model.id = {settings.id!r}: no config: {error}") from error


class ModelSource:
    """Where a model is: a hub id or folder, and a GGUF file in it or None."""

    def __init__(self, name: str, gguf: str | None = None):
        self.name, self.gguf = name, gguf

    def options(self, revision) -> dict:
        options = {"revision": revision} if revision else {}
        return {**options, "gguf_file": self.gguf} if self.gguf else options

    def dequantised(self) -> dict:
        """Makes transformers unpack a GGUF's weights, which it may otherwise keep packed."""
        if self.gguf is None:
            return {}
        import inspect

        from transformers import GgufConfig

        if "dequantize" not in inspect.signature(GgufConfig).parameters:  # older releases always unpack
            return {}
        return {"quantization_config": GgufConfig(gguf_file=self.gguf, dequantize=True)}


def locate(model_id: str) -> ModelSource:
    """Finds what model.id names. Raises ModelError with what to do where it is not there."""
    if model_id.startswith("package:"):
        try:
            files = find_package_files(model_id)
        except LinearizeError as error:
            raise ModelError(f"model.id = {model_id!r}: {error}") from error
        if len(files) != 1:
            raise ModelError(f"model.id = {model_id!r} names {len(files)} files; it must name one")
        path = files[0]
    else:
        path = Path(model_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model.id = {model_id!r}: no such file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"model.id = {model_id!r} is not a GGUF file (it does not begin with 'GGUF')")
        return ModelSource(str(path.parent), path.name)
    if path.exists():
        read_config(path)
    elif model_id.startswith((".", "/", "~")) or model_id.count("/") != 1 and "/" in model_id:
        raise ModelError(f"model.id = {model_id!r}: no such folder")
    return ModelSource(model_id)


def read_config(folder: Path) -> dict:
    """config.json of a model folder. Raises ModelError where there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json. Make one with: linearize convert RECIPE"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error


def pick_device(device: str) -> torch.device:
    """auto: the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r}: {error}") from error
    if picked.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (picked.index or 0):
            sees = f"only {count} CUDA devices" if count else "no CUDA device"
            raise ModelError(f"device {device!r}: torch sees {sees} here. Use auto or cpu.")
        return picked
    try:
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, ImportError) as error:  # which of them depends on the kind of device
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ModelError(f"device {device!r} is not on this machine: {reason}. Use auto or cpu.") from error
    return picked


def pick_dtype(dtype: str, device: torch.device, *, gguf: bool = False):
    """auto: float32 on a CPU; on a GPU the checkpoint's own, bfloat16 for a GGUF."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if gguf else "auto"
