"""linearize: turns a pretrained Transformer into one whose memory does not grow with the text.

Importing it is cheap and teaches `AutoModelForCausalLM` to load exported folders. The names below load what
they need when first used.
"""

import importlib

from linearize import registration

__version__ = "0.1.0"

_PUBLIC = {
    "Decoder": "linearize.decoding",
    "GraphCache": "linearize.graph_cache",
    "LinearizeError": "linearize.errors",
    "Recipe": "linearize.recipe",
    "Sampling": "linearize.sampling",
    "State": "linearize.state",
    "generate": "linearize.decoding",
    "linearize_": "linearize.architecture",
    "load": "linearize.loading",
    "load_recipe": "linearize.recipe",
    "read": "linearize.state",
    "save_step": "linearize.export_step",
    "to_yaml": "linearize.recipe",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'linearize' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


registration.announce()
