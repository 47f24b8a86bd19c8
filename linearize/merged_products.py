"""Products of one input as one product while decoding: q, k and v of an attention, gate and up of an MLP.

A step of few rows reads weights, and reads one large matrix faster than three small ones. Which linear layers belong
together is seen in a step: those side by side in one module that were given the very same input. Their weights move
into one buffer, of which the parameters become views: no name, shape or value of theirs changes, no memory is added.

N inputs, M outputs of a linear layer
"""

import weakref
from contextlib import contextmanager
from types import MethodType

import torch
from torch import nn

from .instances import swapped

_BUFFERS = weakref.WeakValueDictionary()  # address -> the buffer there, as long as anything is a view of it


class MergedProducts:
    """The linear layers of a model that one product each can stand for, merged; `run` runs a step of it.

    Layers of LoRA, of quantised weights, with hooks or a forward of their own stay as they are.
    """

    def __init__(self, model, run):
        self.products = [Product(linears) for linears in of_one_input(model, run) if can_merge(linears)]

    @contextmanager
    def on(self):
        """Inside, the model's layers are the merged ones."""
        with swapped(change for product in self.products for change in product.changes):
            yield

    def refresh(self) -> None:
        """Parameters that have got other memory since, as a merged LoRA's, are views again, of their new values.

        Layers that have got hooks or a forward of their own since are on their own again.
        """
        self.products = [p for p in self.products if not any(map(has_own_call, p.linears))]
        for product in self.products:
            product.refresh()


class Product:
    """One product for linear layers of equal inputs: the first to be called makes it, each takes its columns."""

    def __init__(self, linears):
        self.linears, self.sizes = linears, [linear.out_features for linear in linears]
        self.weight, self.bias = (
            None if getattr(linears[0], name) is None else joined([getattr(linear, name) for linear in linears])
            for name in ("weight", "bias")
        )
        self.changes = [  # under attributes: torch.compile then sees that another decoder's are of the same sort
            change
            for i, linear in enumerate(linears)
            for change in ((linear, "part_of", (self, i)), (linear, "forward", MethodType(_part, linear)))
        ]
        self.input = self.parts = None  # between the first and the last call on one input
        self.refresh()

    @torch.inference_mode(False)  # the model's weights outlive the mode, and may be trained
    @torch.no_grad()
    def refresh(self) -> None:
        """Makes each parameter a view of its rows of the buffer, with the values it has."""
        for name, buffer in (("weight", self.weight), ("bias", self.bias)):
            if buffer is None:
                continue
            for linear, rows in zip(self.linears, buffer.split(self.sizes), strict=True):
                parameter = getattr(linear, name)
                same = all(getattr(parameter, x) == getattr(rows, x) for x in ("shape", "dtype", "device"))
                if same and parameter.data_ptr() != rows.data_ptr():
                    rows.copy_(parameter)
                    parameter.data = torch.from_dlpack(rows)  # a storage of its own, as whoever saves it expects


def _part(linear, x):
    """[..., N] -> [..., M] of one layer: its columns of the product of all."""
    product, i = linear.part_of
    if x is not product.input:
        product.input = x
        product.parts = nn.functional.linear(x, product.weight, product.bias).split(product.sizes, -1)
    part = product.parts[i]
    if i == len(product.sizes) - 1:
        product.input = product.parts = None
    return part


def of_one_input(model, run) -> list[list[nn.Linear]]:
    """Linear layers that are children of one module and were called one after the other on one tensor, by groups.

    Those that `run` calls more than once are in none.
    """
    parents = {id(child): module for module in model.modules() for child in module.children()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and not has_own_call(m)]
    groups, calls = [], {id(linear): 0 for linear in linears}
    before, given = None, lambda: None  # parent and weak reference to the input of the call before

    def note(linear, args):
        nonlocal before, given
        parent, x = parents[id(linear)], args[0] if len(args) == 1 else None
        calls[id(linear)] += 1
        if x is not None and parent is before and given() is x:
            groups[-1].append(linear)
        else:
            groups.append([linear])
        before, given = parent, (lambda: None) if x is None else weakref.ref(x)

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [group for group in groups if len(group) > 1 and all(calls[id(linear)] == 1 for linear in group)]


def has_own_call(module) -> bool:
    """Whether calling a module does more than its class's forward: hooks, or a forward of its own."""
    return bool("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def can_merge(linears) -> bool:
    """Whether these are plain linear layers of one dtype and device, with biases all or none."""
    weights = [linear.weight for linear in linears]
    parameters = [p for linear in linears for p in linear.parameters()]
    kinds = {(type(p.data), p.dtype, p.device) for p in parameters}
    return (
        all(type(linear) is nn.Linear for linear in linears)
        and len(kinds) == 1
        and kinds.pop()[0] is torch.Tensor
        and weights[0].is_floating_point()
        and len({linear.bias is None for linear in linears}) == 1
        and len({id(p) for p in parameters}) == len(parameters)
    )


@torch.inference_mode(False)
def joined(parameters) -> torch.Tensor:
    """A buffer [sum M_i, ...] for parameters [M_i, ...]: that in which the first lies already, else a new one."""
    first, shape = parameters[0].detach(), (sum(len(p) for p in parameters), *parameters[0].shape[1:])
    buffer = _BUFFERS.get(first.data_ptr())
    if buffer is None or buffer.shape != shape or buffer.dtype != first.dtype:
        buffer = first.new_empty(shape)
        _BUFFERS[buffer.data_ptr()] = buffer
    return buffer
