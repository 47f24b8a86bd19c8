"""The recipe: everything a conversion depends on, and what each setting may be.

A recipe is written as YAML; `load_recipe` reads it, `to_yaml` writes the resolved one beside every result.
Paths in a recipe are relative to the current directory.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from linearize import config, shipped
from linearize.errors import RecipeError
from linearize.lengths import length_problems
from linearize.settings import Section, setting

MAP_DIMS = {"taylor": 4, "hedgehog": 64}  # by default: as measured for taylor, and as in LoLCATs (arXiv 2410.10254)
SHORTEST_COPY = 16  # tokens: over less, copying says nothing (the first eight of a repetition do not count)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The pretrained model to convert."""

    id: str = setting(help="hub id, folder, .gguf file, or package:NAME/FILE in an installed package")
    revision: str | None = setting(None, help="branch, tag or commit of a hub model")
    dtype: Dtype = setting("auto", help="weights while converting; auto is the model's own")


@dataclass(frozen=True, kw_only=True)
class FeatureMapSettings(Section):
    """The learned map of queries and keys before the linear attention of older tokens."""

    name: Literal["taylor", "hedgehog", "none", "equal_window"] = setting(
        "taylor",
        help="taylor: 1 + x + x^2/2; hedgehog: softmax; none: window and sinks alone; equal_window: the baseline, none "
        "with the window widened to the bytes that taylor would take",
    )
    dim: int | None = setting(
        None, help="width of the map; a Taylor state grows with its square; null: 4, of hedgehog 64 or the head dim",
        minimum=1,
    )  # fmt: skip
    per: Literal["kv_head", "query_head"] = setting(
        "kv_head", help="keys' maps shared by a kv head's queries, or one a query head (a larger state)"
    )

    def width(self, head_dim: int) -> int:
        """Columns of the map for heads of so many: `dim`, or the map's own default. The baselines count as taylor."""
        if self.dim is not None:
            return self.dim
        return min(head_dim, MAP_DIMS["hedgehog"]) if self.name == "hedgehog" else MAP_DIMS["taylor"]


@dataclass(frozen=True, kw_only=True)
class KeepSoftmaxSettings(Section):
    """What stays softmax: named layers and kv heads, and as many more as asked, chosen after matching."""

    layers: list[int] = setting([], help="whole layers, from 0", minimum=0, unique=True)
    heads: list[list[int]] = setting([], help="single kv heads, [layer, head] each, from 0")
    count: int = setting(0, help="how many more to choose once the layers are matched", minimum=0)
    by: Literal["recall", "kl", "recall_then_kl", "even"] = setting(
        "recall",
        help="what the choice makes small: copy perplexity, KL to the original, or for half of it (rounded up) the one "
        "and then the other; even: spaced evenly",
    )
    unit: Literal["layer", "kv_head"] = setting("layer", help="what count counts")

    def check(self) -> Iterator[str]:
        """Heads are pairs, each once, of layers that are not kept whole."""
        bad = [pair for pair in self.heads if len(pair) != 2 or min(pair) < 0]
        if bad:
            yield f"heads: must be [layer, head] pairs, from 0, is {bad[0]}"
            return
        if len({tuple(pair) for pair in self.heads}) < len(self.heads):
            yield f"heads: must not repeat an entry, is {self.heads}"
        twice = sorted({layer for layer, _ in self.heads} & set(self.layers))
        if twice:
            yield f"heads: layers {twice} are kept whole by layers; name them in one of the two"


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(Section):
    """What replaces softmax attention."""

    window: int = setting(192, help="newest tokens with exact softmax attention", minimum=1)
    sinks: int = setting(4, help="first tokens of a text that stay exact", minimum=0)
    feature_map: FeatureMapSettings = field(default_factory=FeatureMapSettings)
    decay: bool = setting(False, help="a learned decay per head of the older tokens")
    keep_softmax: KeepSoftmaxSettings = field(default_factory=KeepSoftmaxSettings)


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """The text to train on."""

    source: str | list[str] = setting(
        help="hub dataset, globs of .parquet .jsonl .json .txt, or package:NAME/GLOB",
        nonempty=True,
        unique=True,
    )
    name: str | None = setting(None, help="configuration of a hub dataset")
    split: str = setting("train", help="split of a hub dataset")
    column: str = setting("text", help="column of text; a+b+c: columns of instruction and answer")
    messages: str | None = setting(None, help="column of chat messages, put through the chat template")
    sequence_length: int = setting(1024, help="tokens a training sequence", minimum=2)
    packing: bool = setting(True, help="join short texts to full sequences")
    held_out: int = setting(16, help="sequences never trained on, for evaluation", minimum=1)
    streaming: bool = setting(False, help="read a hub dataset as needed, without downloading it first")
    seed: int = setting(0, help="order of the texts", minimum=0)


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(Section):
    """Start values of maps, key centres and gates, from statistics."""

    sequences: int = setting(4, help="sequences to measure; 0 skips", minimum=0)


@dataclass(frozen=True, kw_only=True)
class StageSettings(Section):
    """What both training stages have."""

    tokens: int = setting(
        2_000_000, help="tokens to train on (k, M, B: 10^3, 10^6, 10^9); 0 skips", minimum=0
    )
    batch_tokens: int = setting(16_000, help="tokens a step, over all processes", minimum=1)
    sequence_length: int | None = setting(
        None, help="tokens a sequence in this stage and its evaluation; null is data.sequence_length", minimum=2
    )
    micro_batch: int | None = setting(
        None, help="sequences a forward pass in this stage; null is as many tokens as run.micro_batch", minimum=1
    )
    lr: float = setting(1e-2, help="peak learning rate", above=0)
    warmup: float = setting(0.05, help="fraction of the steps", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, help="decoupled, as in AdamW", minimum=0)
    clip: float = setting(1.0, help="largest norm of the gradients", above=0)
    evaluate_every: int = setting(25, help="steps between evaluations on the held-out text", minimum=1)
    patience: int = setting(5, help="evaluations without improvement to stop after; 0 never stops", minimum=0)
    window_dropout: float = setting(
        0.0,
        help="chance of a shorter window, so that the linear part must work; falls to 0 by the end",
        minimum=0,
        maximum=1,
    )
    repeated_passages: float = setting(
        0.0, help="share of the training rows that say a passage twice, to learn recall from", minimum=0, maximum=1
    )

    def check(self) -> Iterator[str]:
        """A stage with tokens has at least one step."""
        if 0 < self.tokens < self.batch_tokens:
            yield f"tokens: {self.tokens} is less than a step of batch_tokens ({self.batch_tokens}); 0 skips"


@dataclass(frozen=True, kw_only=True)
class MatchSettings(StageSettings):
    """Stage 1: each layer learns its softmax original's output."""

    clip: float = setting(1.0, help="largest norm of one layer's gradients", above=0)
    far_mass: float = setting(
        0.0, help="weight of the older tokens' share of the attention, beside the output (more time a step)", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Section):
    """Low-rank updates of the projections, merged at the end."""

    rank: int = setting(8, help="rank; higher holds more and costs memory", minimum=1)
    alpha: float = setting(16.0, help="scale; the update is multiplied by alpha / rank", above=0)
    dropout: float = setting(0.0, help="on the input of the update", minimum=0, below=1)
    targets: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj"], help="names of linear modules", nonempty=True, unique=True
    )


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section):
    """Weights of the terms."""

    ce: float = setting(1.0, help="next token of the text", minimum=0)
    kl: float = setting(0.0, help="the original model's distribution (a second forward pass)", minimum=0)

    def check(self) -> Iterator[str]:
        """There is something to learn from."""
        if self.ce == 0 and self.kl == 0:
            yield "ce: must not be 0 together with kl: there would be no loss"


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(StageSettings):
    """Stage 2: the whole model learns the text again, by LoRA and the learned maps."""

    train: Literal["lora", "layers"] = setting(
        "lora", help="lora; or layers: every weight but embeddings and output head (16 bytes more a weight)"
    )
    lr: float = setting(2e-4, help="peak learning rate of LoRA, or of the layers' weights", above=0)
    maps_lr: float = setting(1e-3, help="peak learning rate of maps, centres and gates; 0 freezes", minimum=0)
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: LossSettings = field(default_factory=LossSettings)


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """How it runs; changes speed and memory, the seed aside."""

    seed: int = setting(0, help="start values and dropout", minimum=0)
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    micro_batch: int = setting(
        1, help="sequences a forward pass and process; of another length in a stage, as many tokens", minimum=1
    )
    gradient_checkpointing: bool = setting(False, help="less memory, a second forward pass (finetune)")
    compile: bool | None = setting(
        None, help="torch.compile of the layers in training; null: on a GPU, where a stage is long enough to gain"
    )
    cuda_graph: bool | None = setting(
        None, help="training's micro-batches as a CUDA graph, for the time of launches; null: on a GPU, where it can be"
    )
    softmax_by_text: bool | None = setting(
        None, help="training's softmax over each text of packed rows, without a mask; null: on a GPU, where it can"
    )
    checkpoint_every: int = setting(50, help="steps between checkpoints to resume from", minimum=1)
    trackers: list[str] = setting([], help="accelerate's trackers: tensorboard, wandb, ...", unique=True)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Section):
    """The report card at the end."""

    sequences: int = setting(8, help="held-out sequences for perplexity by position; 0 skips", minimum=0)
    sequence_length: int = setting(1024, help="tokens of each", minimum=2)
    text: str | None = setting(None, help="plain text file whose perplexity is measured too, up to 4 x sequences rows")
    recall_distances: list[int] = setting(
        [128, 512], help="tokens between a fact and its question", minimum=1, unique=True
    )
    key_recall_samples: int = setting(
        32, help="questions a distance, on keys planted in the text; 0 skips", minimum=0
    )
    key_recall_pairs: list[int] = setting(
        [4, 8], help="keys and values planted in a text, each number asked for", minimum=2, nonempty=True, unique=True
    )
    baseline: str | None = setting(
        None, help="folder of a converted window + sinks alone, the card's last row; null: one that is not trained"
    )
    tasks: list[str] = setting([], help="lm-eval tasks (needs the extra: linearize[eval])", unique=True)
    task_path: str | None = setting(None, help="folder of your own lm-eval tasks")
    task_limit: int | None = setting(None, help="examples a task; null is all", minimum=1)

    def check(self) -> Iterator[str]:
        """Settings of tasks come with tasks, and a text with a report card."""
        if self.text is not None and not self.sequences:
            yield "text: is set but sequences is 0, so no report card is made; set sequences"
        if self.baseline is not None and not self.sequences:
            yield "baseline: is set but sequences is 0, so no report card is made; set sequences"
        for name in ("task_path", "task_limit"):
            if getattr(self, name) is not None and not self.tasks:
                yield f"{name}: is set but tasks is empty; name the tasks to run"


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Section):
    """The result: a folder that transformers loads."""

    folder: str | None = setting(None, help="null is runs/ and the recipe's name")
    dtype: Dtype = setting("auto", help="weights as saved; auto is the model's own")


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """A conversion, complete."""

    name: str = field(default="recipe", compare=False, metadata={"yaml": False})
    model: ModelSettings
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    data: DataSettings
    calibrate: CalibrateSettings = field(default_factory=CalibrateSettings)
    match: MatchSettings = field(default_factory=MatchSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    run: RunSettings = field(default_factory=RunSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    @property
    def output_folder(self) -> Path:
        """Where everything of this conversion goes."""
        return Path(self.output.folder) if self.output.folder else Path("runs") / self.name

    @property
    def has_far_term(self) -> bool:
        """Whether there is linear attention at all."""
        return self.attention.feature_map.name not in ("none", "equal_window")

    @property
    def trained(self) -> dict[str, StageSettings]:
        """The training stages that have something to do, by name. A baseline without a far term is only finetuned."""
        stages = {"match": self.match} if self.has_far_term else {}
        stages["finetune"] = self.finetune
        return {name: stage for name, stage in stages.items() if stage.tokens}

    @property
    def rank_distances(self) -> list[int]:
        """Distances of copy recall at which layers are ranked: a row holds them, and twice that is not too long."""
        longest = self._longest_rank_distance
        return sorted(d for d in self.evaluate.recall_distances if SHORTEST_COPY <= d <= longest)

    @property
    def _longest_rank_distance(self) -> int:
        row = self.evaluate.sequence_length
        return min(row - 1, max(self.data.sequence_length, row) // 2)  # a row may begin with a BOS token

    def rank_problems(self) -> Iterator[str]:
        """Why nothing could be ranked by these settings."""
        by = self.attention.keep_softmax.by
        if by in ("recall", "recall_then_kl") and not self.rank_distances:
            yield (
                f"attention.keep_softmax.by: {by} needs an evaluate.recall_distances of {SHORTEST_COPY} to "
                f"{self._longest_rank_distance}, by the sequence lengths; add one, or choose by kl"
            )

    def check(self) -> Iterator[str]:
        """Settings of different groups that do not go together."""
        if self.attention.keep_softmax.count:
            yield from self.rank_problems()
        if self.attention.feature_map.name == "none" and (self.calibrate.sequences or self.match.tokens):
            yield (
                "attention.feature_map.name: none leaves nothing to calibrate or match; set calibrate.sequences and "
                "match.tokens to 0"
            )
        name = self.attention.feature_map.name
        if not self.has_far_term and self.finetune.window_dropout:
            yield f"finetune.window_dropout: attention.feature_map.name {name} has no linear part to train; set it to 0"
        if self.run.cuda_graph and self.run.gradient_checkpointing and self.finetune.tokens:
            yield "run.cuda_graph: finetuning with run.gradient_checkpointing cannot be recorded; set it to null"
        if self.run.cuda_graph and any(stage.window_dropout for stage in self.trained.values()):
            yield "run.cuda_graph: a stage with window_dropout cannot be recorded; set it to null"
        if self.match.far_mass and not self.attention.sinks:
            yield "match.far_mass: is measured against the sinks' share; set attention.sinks to 1 or more, or it to 0"
        yield from length_problems(self, self.attention.window)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        source: a .yaml file; the name of a shipped recipe; or a model (a folder, a .gguf file,
            package:NAME/FILE or a hub id with a slash), which means the recipe `default` with that model.
        overrides: `a.b=value` strings that win over the file.
    Raises:
        RecipeError: nothing of that name, or a recipe with problems (all of them in the message).
    """
    source = str(source)
    if source.endswith((".yaml", ".yml")):
        return _read(Path(source), overrides)
    if source in [name for name, _ in shipped.list_recipes()]:
        return _read(shipped.recipe_path(source), overrides)
    _require_model(source)
    # JSON text is YAML, whatever characters the model's name has
    model = f"model.id={json.dumps(source, ensure_ascii=False)}"
    path = Path(source) if source.startswith("package:") else Path(source).absolute()
    name = path.stem if path.suffix == ".gguf" else path.name
    return replace(_read(shipped.recipe_path("default"), [model, *overrides]), name=name)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe: every setting, defaults included; `load_recipe` reads it back to an equal one."""
    return config.to_yaml(recipe, header="The resolved recipe: every setting, defaults included.")


def _read(path: Path, overrides: Sequence[str]) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; the shipped recipes: linearize recipes ls") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from error
    return config.parse(Recipe, text, where=str(path), overrides=overrides, name=path.stem)


def _require_model(source: str) -> None:
    """Raises RecipeError where a name is neither a model that is here nor could be one on the hub."""
    if Path(source).is_dir() or re.fullmatch(r"package:[^/]+/.+", source):
        return
    if source.startswith("package:"):
        raise RecipeError(f"{source}: a file inside an installed package is written package:NAME/FILE")
    if source.endswith(".gguf") or source.startswith(("/", "./", "../", "~")):
        if Path(source).is_file() and source.endswith(".gguf"):
            return
        raise RecipeError(f"{source}: no such model file or folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII):
        return
    if "/" in source:
        raise RecipeError(f"{source}: no such folder, and a hub id has the form owner/name")
    try:
        shipped.recipe_path(source)
    except RecipeError as error:
        raise RecipeError(f"{error} (a hub model is written owner/name, a folder ./name)") from None
