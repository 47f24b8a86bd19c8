"""The kernels against the float64 reference on this machine's GPU, before they are trusted there.

Some releases of Triton (3.4 to 3.7.0 on Hopper) compile correct programs wrongly, so that every new
combination of shapes is compared once a process.
"""

import functools
import math

import torch

from .reference import attention_quadratic


def once_a_process(test):
    """A test of a device and whatever more, run once of each sort: there, whatever device, autocast, inference mode or
    gradients its first caller has set."""

    @functools.cache
    @functools.wraps(test)
    def alone(device, *sort, **options):
        with (
            torch.cuda.device_of(torch.empty(0, device=device)),
            torch.autocast(torch.device(device).type, enabled=False),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            return test(device, *sort, **options)

    return alone


@once_a_process
def self_test(device, dtype, *, prefill: bool, heads: int, groups: int, far_heads: int, head_dim: int,
              value_dim: int, map_dim: int, decay=False, masked=False, backward=True, cuda="", window=64,
              sinks=4):  # fmt: skip
    """Largest relative RMS error of output, gradients (training) and sum (prefill): (error, allowed error).

    Random inputs of 536 tokens more than the window. NaN counts as infinite. masked: with padding and segments, or of
    a prefill with padding and a past. cuda: "prefill", or the part of training,
    "forward" or "backward", that is to run in CUDA; the rest runs in Triton. window, sinks: what CUDA kernels are
    compiled for.
    """
    length = 536 + window
    inputs, grad = _draw(device, dtype, heads, groups, far_heads, head_dim, value_dim, map_dim, length=length)
    options = dict(scaling=head_dim**-0.5, window=window, sinks=sinks)
    if masked:
        slots = torch.arange(length, device=device)[None]
        if not cuda:  # CUDA kernels know no padding
            options["valid"] = slots >= 9
        if not prefill:
            options["segments"] = (slots >= 150).long() + (slots >= 151)
    if not decay:
        inputs.pop("log_decay")
    if prefill:
        expected, got = _prefill_results(inputs, options, cuda)
    else:
        expected, got = _training_results(inputs, options, grad, backward, cuda)
    return largest_error(got, expected), 1e-4 if dtype == torch.float32 else 1e-2


@once_a_process
def self_test_decode(device, dtype, *, launch, splits: int, heads: int, groups: int, head_dim: int, value_dim: int,
                     map_dim: int, window: int, sinks: int, decay=False, far_dtype=None,
                     sum_dtype=torch.float32):  # fmt: skip
    """As `self_test`, of `decode` and `decode_mapped` with the launch (which says the kernel) and the splits that a
    layer's state would take. far_dtype: of the ring's mapped keys, where it is another.

    One row: a prompt that has filled the window, then tokens enough for two folds.
    """
    from .decode import FOLD, DecodeState, decode, decode_mapped
    from .reference import attention_chunked

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not maps_agree(device, dtype, heads=heads + groups, head_dim=head_dim, columns=map_dim + 1):
        return math.inf, 0.0
    prompt, length = window + 100, window + 100 + 2 * FOLD
    inputs, _ = _draw(device, dtype, heads, groups, groups, head_dim, value_dim, map_dim, length=length)
    log_decay = inputs.pop("log_decay")
    log_decay = log_decay if decay else None
    tokens = torch.cat([inputs["q"], inputs["k"]], 1)
    maps = [_draw_map(device, heads + groups, n, map_dim + 1) * head_dim**-0.5 for n in (head_dim, 1)]
    q_far, k_far = (tokens.double() @ maps[0].double() + maps[1].double()).float().split([heads, groups], 1)
    inputs |= dict(q_far=q_far[..., :-1], k_far=k_far[..., :-1], gate=q_far[..., -1])
    options = dict(scaling=head_dim**-0.5, log_decay=log_decay)
    with torch.no_grad():
        exact = {name: x.double() for name, x in inputs.items()}
        expected, _ = attention_quadratic(**exact, **options, window=window, sinks=sinks)
        before = {name: x[:, :, :prompt] for name, x in inputs.items()}
        before["k_far"] = before["k_far"].to(far_dtype or dtype)
        _, past = attention_chunked(**before, **options, window=window, sinks=sinks, return_state=True)
        got, options = [], options | dict(launch=launch)
        for mapped in (False, True):
            state, outputs = DecodeState.from_state(past, window=window, dtype=sum_dtype, splits=splits), []
            for t in range(prompt, length):
                token = {name: x[:, :, t : t + 1] for name, x in inputs.items()}
                if mapped:
                    out = decode_mapped(tokens[:, :, t : t + 1], token["v"], *maps, state, **options)
                else:
                    out = decode(**token, state=state, **options)
                outputs.append(out)
            got.append(torch.cat(outputs, 2))
    allowed = 2e-2 if sum_dtype == torch.bfloat16 else 1e-4 if dtype == torch.float32 else 1e-2
    return largest_error(got, [expected[:, :, prompt:]] * 2), allowed


@once_a_process
def self_test_losses(device, dtype, teacher_dtype=None, *, vocabulary: int):
    """As `self_test`, of `logit_losses` and its gradient, with a teacher where its dtype is given.

    Five tokens, one without a label.
    """
    from .logit_loss_kernels import LogitLosses
    from .logit_losses import IGNORED, logit_losses_reference

    generator = torch.Generator(device).manual_seed(0)
    logits, teacher = (torch.randn(5, vocabulary, generator=generator, device=device) * 4 for _ in range(2))
    labels = torch.randint(vocabulary, (5,), generator=generator, device=device)
    labels[1] = IGNORED
    teacher = None if teacher_dtype is None else teacher.to(teacher_dtype)

    def results(function, x, teacher):
        x = x.requires_grad_()
        ce, kl = function(x, labels, teacher)
        losses = [ce] if teacher is None else [ce, kl]
        return [*losses, *torch.autograd.grad(ce + 0.5 * kl, x)]

    x = logits.to(dtype)
    expected = results(logit_losses_reference, x.double(), None if teacher is None else teacher.double())
    got = results(LogitLosses.apply, x, teacher)
    return largest_error(got, expected), 1e-4 if dtype == torch.float32 else 1e-2


def largest_error(got, expected) -> float:
    """The largest relative RMS error; NaN counts as infinite."""
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    return max(math.inf if math.isnan(e) else e for e in errors)


@once_a_process
def maps_agree(device, dtype, *, heads: int, head_dim: int, columns: int) -> bool:
    """Whether `map_heads`, which a decode step maps by, multiplies in float32, for few rows and many."""
    from .map_heads import map_heads

    generator = torch.Generator(device).manual_seed(0)
    weight, bias = (_draw_map(device, heads, n, columns) for n in (head_dim, 1))
    for rows in (1, 40):
        x = torch.randn(rows, heads, 1, head_dim, generator=generator, device=device).to(dtype)
        expected = (x.double().transpose(0, 1)[:, :, 0] @ weight.double() + bias.double()).transpose(0, 1)[:, :, None]
        if not (map_heads(x, weight, bias) - expected).norm() < 1e-4 * expected.norm():
            return False
    return True


def _draw_map(device, *shape):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(1), device=device)


def _draw(device, dtype, heads, groups, far_heads, head_dim, value_dim, map_dim, length=600):
    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads, *size):
        return torch.randn(1, num_heads, length, *size, generator=generator, device=device).to(dtype)

    inputs = dict(
        q=draw(heads, head_dim), k=draw(groups, head_dim), v=draw(groups, value_dim),
        q_far=draw(heads, map_dim) * 0.5, k_far=draw(far_heads, map_dim) * 0.5, gate=draw(heads),
        log_decay=-torch.linspace(0.01, 0.1, far_heads, device=device),
    )  # fmt: skip
    return inputs, draw(heads, value_dim)


def _prefill_results(inputs, options, cuda):
    with torch.no_grad():
        exact = {name: x.double() for name, x in inputs.items()}
        expected = attention_quadratic(**exact, **options, return_state=True)
        if cuda:
            from .cuda_prefill import attention_prefill_cuda

            got = [attention_prefill_cuda(**inputs, **options, segments=n) for n in (1, 3)]  # in one piece, and cut
        else:
            got = [_prefilled_in_pieces(inputs, **options) if "valid" in options else _prefilled(**inputs, **options)]
    return [[x for out, state in each for x in (out, state.total)] for each in ([expected] * len(got), got)]


def _prefilled(**arguments):
    from .prefill import attention_prefill

    return attention_prefill(**arguments)


def _prefilled_in_pieces(inputs, *, valid, **options):
    """What follows a past, which takes the same programs as padding."""
    inputs, state, outputs, length = dict(inputs), None, [], valid.shape[1]
    log_decay = inputs.pop("log_decay", None)
    for start, end in ((0, length - 250), (length - 250, length)):
        piece = {name: x[:, :, start:end] for name, x in inputs.items()}
        out, state = _prefilled(**piece, **options, log_decay=log_decay, valid=valid[:, start:end], state=state)
        outputs.append(out)
    return torch.cat(outputs, 2), state


def _training_results(inputs, options, grad, backward, cuda):
    """Output and gradients, then (where the backward is another program) those with q, k and v frozen."""
    from .training import attention_training

    parts = {part: "cuda" if part == cuda else "triton" for part in ("forward", "backward")}
    expected = _gradients(attention_quadratic, inputs, options, grad.double(), backward)
    trained = functools.partial(attention_training, **parts)
    got = _gradients(trained, inputs, options, grad, backward)
    if backward:
        frozen = ("q", "k", "v")
        got += _gradients(trained, inputs, options, grad, True, frozen)
        expected += [expected[0], *expected[1 + len(frozen) :]]
    return expected, got


def _gradients(function, inputs, options, grad, backward, frozen=()) -> list:
    """Output and, with backward, the gradients of all inputs but `frozen`, in grad's dtype."""
    with torch.set_grad_enabled(backward):
        given = {n: x.detach().to(grad.dtype).requires_grad_(backward and n not in frozen) for n, x in inputs.items()}
        out = function(**given, **options)
        out = out[0] if isinstance(out, tuple) else out
        leaves = [x for x in given.values() if x.requires_grad]
        return [out, *(torch.autograd.grad(out, leaves, grad) if backward else [])]
