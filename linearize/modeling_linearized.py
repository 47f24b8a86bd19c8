"""A decoder of transformers with some of its softmax attention layers replaced, as transformers sees it.

Nothing of a model's code is copied. A converted layer is the base model's own attention module, its class
swapped for a subclass of itself; a function registered with transformers' attention interface receives q, k
and v after projection, norms and rotary embedding and hands them to `module.linear_attn`. Config and model
classes are made on demand from the base model's (`LinearizedLlamaConfig`, `LinearizedLlamaForCausalLM`, ...).

An exported folder carries this file and those it imports relatively, so that it loads with
trust_remote_code=True where linearize is not installed.

B batch, T time, H query heads, G kv heads, D head dim
"""

import copy
import functools
import inspect
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .linear_attention import FEATURE_MAPS, LinearAttention, State, hybrid_attention
from .linearized_cache import CacheError, LinearizedCacheLayer, chosen_cache
from .softmax_heads import kept_attention, scaling_of, teacher_attention

LINEARIZED = "linearized"  # model type, and the attention implementation in which converted layers are linear
TEACHER = "linearized_teacher"  # the attention implementation in which they run the base model's softmax
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # since transformers 5.24; before; in GPT-NeoX before
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
CAUSAL_LM = ("ForCausalLM", "LMHeadModel")  # how transformers' class names of causal language models end


# ------------------------------------------------------------------------------------ attention functions


def linearized_attention(module, query, key, value, attention_mask, scaling=None, linear_context=None,
                         linear_cache=None, **kwargs):  # fmt: skip
    """transformers' attention interface for a converted layer: q [B, H, T, D], k, v [B, G, T, D] -> out.

    linear_context comes from the model's forward, linear_cache (a Cache or None) from the attention module's.
    Returns (out [B, T, H, D], None).
    """
    valid, segments = linear_context.on(query.device)
    linear, heads, layer = module.linear_attn, module.linear_attn.heads, _cache_layer(module, linear_cache)
    q, k, v = heads.linear_part(query, key, value)
    (sink_logits,) = heads.linear_part(kwargs.get("s_aux"), dim=0)
    options = dict(
        scaling=scaling_of(query, scaling), valid=valid, segments=segments, softcap=kwargs.get("softcap"),
        sink_logits=sink_logits,
    )  # fmt: skip
    out = linear(q, k, v, **options)[0] if layer is None else layer.attend(linear, q, k, v, **options)
    out = out.transpose(1, 2)
    if heads.kept:
        softmax = kept_attention(module, heads, query, key, value, attention_mask, layer, scaling=scaling, **kwargs)
        out = heads.merge(out, softmax)
    return out.contiguous(), None


def _cache_layer(module, cache):
    """The converted layer's own part of a Cache; None without one."""
    if cache is None:
        return None
    layer = cache.layers[module.layer_idx] if module.layer_idx < len(cache.layers) else None
    if not isinstance(layer, LinearizedCacheLayer):
        raise CacheError(
            f"the cache handed to the model ({type(cache).__name__}) holds no state for converted layer "
            f"{module.layer_idx}. Leave {CACHE} out, or pass model.make_cache()."
        )
    return layer


def linearized_mask(*, config, **kwargs):
    """No mask where every head is linear (padding goes another way), else that of the softmax layers and heads."""
    return softmax_mask(config=config, **kwargs) if config._has_softmax else None


def softmax_mask(*, config, **kwargs):
    return ALL_MASK_ATTENTION_FUNCTIONS[config._softmax_implementation](config=config, **kwargs)


def _through_module(function, module, *args, **kwargs):
    """`function` as the module's own `call_attention`, if it was given one, wants it called (see CompiledLayers)."""
    call = getattr(module, "call_attention", None)
    return function(module, *args, **kwargs) if call is None else call(function, module, *args, **kwargs)


for _name, _function in ((LINEARIZED, linearized_attention), (TEACHER, teacher_attention)):
    ALL_ATTENTION_FUNCTIONS.register(_name, functools.partial(_through_module, _function))
ALL_MASK_ATTENTION_FUNCTIONS.register(LINEARIZED, linearized_mask)
ALL_MASK_ATTENTION_FUNCTIONS.register(TEACHER, softmax_mask)


class LinearContext:
    """What converted layers need besides q, k, v; rides through the model's forward as one opaque object."""

    def __init__(self, valid, segments):
        self.valid = valid  # [B, T] bool, or None: no padding
        self.segments = segments  # [B, T] int, or None: one document a row

    def on(self, device):
        """(valid, segments) on the device of a layer."""
        return tuple(None if x is None else x.to(device) for x in (self.valid, self.segments))


# -------------------------------------------------------------------------------------- attention modules


class LinearizedAttentionMixin:
    """Before a base attention class: hands the cache past it, since converted layers have their own kind."""

    def forward(self, **kwargs):
        if self.config._attn_implementation == LINEARIZED:
            kwargs = rename_cache(kwargs, "linear_cache")
        return super().forward(**kwargs)


def rename_cache(kwargs: dict, name: str) -> dict:
    """Arguments of a forward in which the cache, whatever it is called, is called `name`."""
    return {name if key in CACHE_NAMES else key: value for key, value in kwargs.items()}


@functools.cache
def _linearized_attention_class(cls):
    namespace = {"__module__": __name__, "forward": _signed_as(cls.forward, LinearizedAttentionMixin.forward)}
    return type("Linearized" + cls.__name__, (LinearizedAttentionMixin, cls), namespace)


def _signed_as(base_forward, forward):
    """`forward`, which takes keywords alone, under the signature of `base_forward`.

    generate and Trainer read the signature to see what a model takes.
    """
    names = list(inspect.signature(base_forward).parameters)[1:]

    @functools.wraps(base_forward)
    def signed(self, *args, **kwargs):
        if len(args) > len(names):
            raise TypeError(f"forward takes at most {len(names)} positional arguments, not {len(args)}")
        return forward(self, **dict(zip(names[: len(args)], args, strict=True)), **kwargs)

    return signed


def attention_modules(model) -> dict:
    """layer index -> attention module, of layers whose attention goes through transformers' interface."""
    recorded = {}
    for module in model.modules():
        recorded.update(getattr(module, "_can_record_outputs", None) or {})
    wanted = recorded.get("attentions", ())
    wanted = wanted if isinstance(wanted, list | tuple) else [wanted]
    classes = tuple(c for c in (getattr(w, "target_class", w) for w in wanted) if isinstance(c, type))
    found = [m for m in model.modules() if isinstance(m, classes)]
    return {m.layer_idx: m for m in found if getattr(m, "layer_idx", None) is not None}


def attach(model) -> None:
    """Gives the layers named by model.config.linear_attention their linear attention, in place.

    Kept softmax layers get a config of their own that says so, and run exactly as in the base model.
    """
    config, spec = model.config, model.config.linear_attention
    modules = attention_modules(model)
    if config._attn_implementation not in (LINEARIZED, TEACHER):
        config._softmax_implementation = config._attn_implementation
    softmax_config = copy.copy(config)
    softmax_config._attn_implementation = config._softmax_implementation
    spec.setdefault("kept_heads", [[] for _ in spec["layers"]])  # folders made before heads could be kept
    config._has_softmax = set(modules) != set(spec["layers"]) or any(spec["kept_heads"])
    config._attn_implementation = LINEARIZED
    per_layer = zip(spec["layers"], spec["shapes"], spec["kept_heads"], strict=True)
    for index, shape, kept in per_layer:
        module = modules[index]
        module.linear_attn = LinearAttention.by_spec(spec, shape, kept).to(next(module.parameters()).device)
        module.__class__ = _linearized_attention_class(type(module))
    for index, module in modules.items():
        module.config = config if index in spec["layers"] else softmax_config


def linear_attentions(model) -> dict[int, LinearAttention]:
    """layer index -> LinearAttention, of a converted model."""
    modules = {m.layer_idx: m for m in model.modules() if isinstance(m, LinearizedAttentionMixin)}
    return {index: modules[index].linear_attn for index in sorted(modules)}


# --------------------------------------------------------------------------------------- model and config


class LinearizedConfig(PreTrainedConfig):
    """Reads any exported config.json; the class it returns is a subclass of the base model's config."""

    model_type = LINEARIZED

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        base_type = config_dict["base_model_type"]
        if base_type not in CONFIG_MAPPING:
            raise ValueError(f"transformers {transformers.__version__} has no {base_type!r}: install a newer one")
        base = CONFIG_MAPPING[base_type]
        linearized_class(MODEL_FOR_CAUSAL_LM_MAPPING[base])  # registers the pair
        return linearized_class(base).from_dict(config_dict, **kwargs)


class LinearizedConfigMixin:
    """Before a base config class: keeps what is only true of a model in memory out of config.json."""

    def to_dict(self):
        output = super().to_dict()
        for name in ("_softmax_implementation", "_has_softmax"):
            output.pop(name, None)
        return output


class LinearizedMixin:
    """Before a base `ForCausalLM` class: attaches linear attention, makes caches, loads strictly."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        attach(self)

    def forward(self, **kwargs):
        implementation, kwargs = self.config._attn_implementation, rename_cache(kwargs, CACHE)
        if implementation == LINEARIZED:
            run_model = getattr(kwargs.get(CACHE), "run_model", None)
            if run_model is not None:  # a GraphCache
                return run_model(self, **kwargs)
            kwargs.update(with_linear_context(self, **kwargs))
        elif implementation != TEACHER:
            raise ValueError(
                f"the attention implementation of a converted model was set to {implementation!r}, which "
                "would run it as a softmax model. Choose that of kept softmax layers when loading: "
                "from_pretrained(..., attn_implementation=...)."
            )
        return super().forward(**kwargs)

    def make_cache(self) -> DynamicCache:
        """An empty cache: a constant-size state for converted layers, the base model's kind for others."""
        cache = DynamicCache(config=self.config)
        for index in self.config.linear_attention["layers"]:
            cache.layers[index] = LinearizedCacheLayer()
        return cache

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        mine = self.config._attn_implementation == LINEARIZED and generation_config.use_cache is not False
        if not mine or model_kwargs.get(CACHE) is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        model_kwargs[CACHE] = chosen_cache(self, generation_config, *args, **kwargs)
        if generation_config.is_assistant:
            model_kwargs[CACHE].activate_past_recording()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, by name
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[kind]:
                raise ValueError(
                    f"{args[0] if args else ''}: {len(info[kind])} {kind.replace('_', ' ')}, for example "
                    f"{min(info[kind])}: the weights do not belong to this config. Export the model again."
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; the folder also gets the code it needs to load without linearize."""
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True would leave the code behind; call model.push_to_hub(...) instead")
        name = type(self).__name__
        self.config.architectures = [name]
        self.config.auto_map = {
            "AutoConfig": "modeling_linearized.LinearizedConfig",
            "AutoModelForCausalLM": f"modeling_linearized.{name}",
        }
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            for source in code_files():
                shutil.copyfile(source, Path(save_directory) / source.name)


def code_files() -> list[Path]:
    """The source files an exported folder needs; wherever they lie, they go side by side into the folder."""
    parts = (hybrid_attention, State, FEATURE_MAPS["taylor"])
    reference, *others = (Path(sys.modules[part.__module__].__file__) for part in parts)
    names = ("modeling_linearized", "linear_attention", "linearized_cache", "softmax_heads")
    return [*(Path(__file__).with_name(f"{n}.py") for n in names), reference.with_name("reference.py"), *others]


def _padding(attention_mask, batch, length):
    """[B, seen + T] mask of 0 and 1 -> [B, T] bool of the new tokens, or None."""
    if attention_mask is None:
        return None
    shape = getattr(attention_mask, "shape", (type(attention_mask).__name__,))
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise CacheError(
            f"attention_mask must be [{batch} rows, {length} tokens or more] of 0 and 1, not {tuple(shape)}: "
            "converted layers cannot follow a prepared mask. For packed documents pass position_ids that "
            "restart at 0 and no mask."
        )
    return attention_mask[:, -length:].bool()


def _packed_segments(position_ids, batch):
    """[B, T] number of the packed document: positions that do not go on by one start another. None: one."""
    if position_ids is None or position_ids.shape[-1] == 1:  # one token: nothing to read, no wait for the device
        return None
    segments = torch.nn.functional.pad(position_ids.diff(dim=-1) != 1, [1, 0]).long().cumsum(-1)
    recorded = segments.is_cuda and torch.cuda.is_current_stream_capturing()  # a CUDA graph serves any batch
    if not recorded and not segments[:, -1].any():
        return None
    return segments.expand(batch, -1)


def with_linear_context(model, *, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None,
                        use_cache=None, **others):  # fmt: skip
    """The arguments of a forward call that converted layers need changed or added."""
    cache = others.get(CACHE)
    batch, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    segments = None if attention_mask is not None else _packed_segments(position_ids, batch)
    if segments is not None and (use_cache or cache is not None):
        raise CacheError("packed documents (position_ids that restart) share no cache: pass use_cache=False")
    if use_cache is None:
        use_cache = model.config.use_cache and not model.training and segments is None
    if use_cache and cache is None:
        cache = model.make_cache()
    static = getattr(cache, "static_shapes", False)  # one token a row, and the mask is for softmax layers
    context = LinearContext(None if static else _padding(attention_mask, batch, length), segments)
    return {CACHE: cache, "use_cache": use_cache, "linear_context": context}


def linearized_class(base):
    """The linearized subclass of a config or `ForCausalLM` class of transformers; made once."""
    return getattr(sys.modules[__name__], "Linearized" + base.__name__)


def __getattr__(name):
    """Makes LinearizedXConfig and LinearizedXForCausalLM from transformers' X, and registers the pair."""
    base_name = name.removeprefix("Linearized")
    known = base_name != name and base_name.endswith(("Config", *CAUSAL_LM))
    base = getattr(transformers, base_name, None) if known else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    namespace = {"__module__": __name__, "__qualname__": name}
    if name.endswith("Config"):
        cls = type(name, (LinearizedConfigMixin, base), {**namespace, "model_type": LINEARIZED})
    else:
        config_class = linearized_class(base.config_class)
        strict_fp32 = set(getattr(base, "_keep_in_fp32_modules_strict", None) or ()) | {"linear_attn"}
        namespace.update(
            config_class=config_class,
            forward=_signed_as(base.forward, LinearizedMixin.forward),
            _keep_in_fp32_modules_strict=strict_fp32,
            _supports_attention_backend=False,  # servers that swap the attention function in must refuse
            __annotations__={"config": config_class},
        )
        cls = type(name, (LinearizedMixin, base), namespace)
        renamed = get_checkpoint_conversion_mapping(base.__name__)
        renamed = renamed or get_checkpoint_conversion_mapping(base.config_class.model_type)
        if renamed:  # weights whose names in files differ, as the experts of Mixtral
            register_checkpoint_conversion_mapping(name, renamed, overwrite=True)
        AutoModelForCausalLM.register(config_class, cls, exist_ok=True)
    globals()[name] = cls
    return cls


def register() -> None:
    """Teaches transformers' Auto classes to read exported folders; safe to call again."""
    AutoConfig.register(LINEARIZED, LinearizedConfig, exist_ok=True)


register()
