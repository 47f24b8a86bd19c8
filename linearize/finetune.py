"""Finetuning: LoRA on named projections of the converted layers, or all layers' weights; the maps trained along.

Loss: next-token cross-entropy and/or KL to the teacher, which is the same model with its own weights and softmax on.
"""

from contextlib import contextmanager, nullcontext

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D  # a linear layer with its weight transposed, as in GPT-2

from linearize_kernels import logit_losses

from .errors import RecipeError
from .instances import swapped
from .modeling_linearized import LinearizedAttentionMixin, linear_attentions
from .output_head import final_states, output_head
from .sequences import model_inputs
from .train import ParameterGroup
from .variants import softmax_attention

LOSS_CHUNK = 2048  # tokens whose logits are in memory at a time


def add_lora(model, lora):
    """Wraps `model` with peft's LoRA on the projections `lora.targets` of every converted layer.

    Raises RecipeError unless every name is a linear projection of every converted layer.
    """
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM",
        target_modules=projection_names(model, lora.targets),
    )  # fmt: skip
    return get_peft_model(model, config)


def projection_names(model, targets: list[str]) -> list[str]:
    """Full names of the modules that `targets` name in each converted layer (its attention, or its MLP)."""
    attentions = [name for name, m in model.named_modules() if isinstance(m, LinearizedAttentionMixin)]
    names = []
    for attention in attentions:
        block = attention.rpartition(".")[0]
        by_last = {}
        for name, module in model.get_submodule(block).named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                by_last.setdefault(name.rpartition(".")[2], []).append(f"{block}.{name}")
        missing = [t for t in targets if t not in by_last]
        if missing:
            raise RecipeError(
                f"finetune.lora.targets: {', '.join(missing)} not in {block}. Its linear projections are "
                f"{', '.join(sorted(by_last))}; name some of these."
            )
        names += [full for t in targets for full in by_last[t]]
    return names


class FinetuneStage:
    """Finetuning as the training loop sees it. `model`: a peft model over a linearized one, or with TrainedWeights."""

    name = "finetune"
    order = 1

    def __init__(self, model, settings, *, gradient_checkpointing=False):
        self.model, self.loss = model, settings.loss
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.weights = getattr(model, "trained_weights", None)
        self.head = output_head(self.base)  # None: its logits are made whole
        self.modules = list(model.modules())
        self.adapted = [m for m in self.modules if isinstance(m, BaseTunerLayer)]
        maps = [p for layer in linear_attentions(model).values() for p in layer.parameters()]
        for parameter in maps:
            parameter.requires_grad_(settings.maps_lr > 0)
        lora = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        self.groups = [
            ParameterGroup("weights", self.weights.masters, settings.lr)
            if self.weights
            else ParameterGroup("lora", lora, settings.lr)
        ]
        if settings.maps_lr > 0:
            self.groups.append(ParameterGroup("maps", maps, settings.maps_lr))
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()

    def num_terms(self, batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def refresh(self) -> None:
        """Brings what trains into the model, where it is kept beside it."""
        if self.weights:
            self.weights.refresh()

    def run(self, batch, *, scale, backward):
        self.refresh()
        inputs = model_inputs(batch)
        labels = batch["labels"][:, 1:]
        if any(m.training != backward for m in self.modules):
            self.model.train(backward)
        reference = self.teacher_states(inputs) if self.loss.kl else None
        with torch.set_grad_enabled(backward), self.autocast(labels.device):
            weights = scale * self.loss.ce, scale * self.loss.kl
            loss, ce, kl = token_losses(self.states(inputs), labels, reference, self.head, weights=weights)
        if backward:
            loss.backward()
        figures = {"loss": loss.detach(), "ce": scale * ce}
        return {**figures, "kl": scale * kl} if self.loss.kl else figures

    def states(self, inputs):
        """What `head` makes logits of, of the model as it stands: [B, T - 1, hidden], or logits where there is none."""
        if self.head is None:
            return self.model(**inputs, use_cache=False).logits[:, :-1]
        return final_states(self.base, inputs)[:, :-1]

    @contextmanager
    def autocast(self, device):
        """LoRA's float32 weights multiply in the base model's dtype; the maps see to themselves in float32."""
        dtype = self.model.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        uncast = [(m, "cast_input_dtype_enabled", False) for m in self.adapted if half]  # peft's own, without a walk
        with swapped(uncast), torch.autocast(device.type, dtype, enabled=half):
            yield

    @torch.no_grad()
    def teacher_states(self, inputs):
        """`states` of the base model: no second copy of it is needed.

        As inside `variants.teacher`, without peft's walks over all modules.
        """
        bare = [(m, "forward", m.get_base_layer().forward) for m in self.adapted]
        mode = [(m, "training", False) for m in self.modules if m.training]
        own = self.weights.undone() if self.weights else nullcontext()
        with swapped(bare + mode), own, softmax_attention(self.model):
            return self.states(inputs)


def token_losses(states, labels, teacher=None, head=None, *, weights=(1.0, 1.0)):
    """(loss, ce, kl), sums over tokens with a label, in float32, in nats; loss is `weights` of the other two.

    states, teacher [B, T, size]: what head makes logits [., vocabulary] of (None: they are logits); labels [B, T],
    -100 where there is nothing to predict. Only loss is differentiable, in states, and head must not train: the
    gradient is made along with the loss, while a chunk's logits, of LOSS_CHUNK tokens, are in memory.
    """
    teacher = None if teacher is None else teacher.flatten(0, 1)
    return _TokenLosses.apply(states.flatten(0, 1), labels.flatten(), teacher, head or torch.nn.Identity(), weights)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, labels, teacher, head, weights):
        losses, differentiable = states.new_zeros(3, dtype=torch.float32), ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if differentiable else None
        for start in range(0, len(states), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            wanted = None if teacher is None else head(teacher[chunk])
            with torch.set_grad_enabled(differentiable):
                part = states[chunk].detach().requires_grad_(differentiable)
                ce, kl = logit_losses(head(part), labels[chunk], wanted)
                loss = weights[0] * ce + weights[1] * kl
            if differentiable:
                (gradient[chunk],) = torch.autograd.grad(loss, part)
            losses += torch.stack([loss, ce, kl]).detach()
        ctx.save_for_backward(gradient)
        loss, ce, kl = losses.clone().unbind()
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope, *_):
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None, None, None, None
