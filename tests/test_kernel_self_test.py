"""A kernel that is wrong does not pass its self-test, whatever of its results is wrong, and is refused.

Without a GPU Triton's kernels run in its interpreter, CUDA's in the emulator.
"""

import functools

import cuda_emulator
import pytest
import torch
from test_cuda_backward import forward
from test_cuda_prefill import make
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import (  # noqa: E402
    attention,
    attention_quadratic,
    cuda,
    cuda_backward,
    cuda_prefill,
    dispatch,
    logit_loss_kernels,
    logit_losses,
    prefill,
    report,
    self_test,
    training,
)
from linearize_kernels.decode import choose_launch  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SIZES = dict(heads=2, groups=1, far_heads=1, head_dim=16, value_dim=16, map_dim=4, window=8, sinks=2)
INPUTS = ("q", "k", "v", "q_far", "k_far", "gate")


def passes(**options) -> bool:
    """Whether the self-test lets Triton's kernels pass."""
    error, allowed = self_test.self_test.__wrapped__(DEVICE, torch.float32, **SIZES, **options)
    return error <= allowed


class Slope(torch.autograd.Function):
    """The same tensor, and a gradient times `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def wrong_training(name, factor=1.01, frozen=False):
    """In attention_training's place: the definition with one result off. frozen: only where q, k, v are frozen."""

    def wrong(*, forward, backward, **given):
        if name in INPUTS and given[name].requires_grad and not (frozen and given["q"].requires_grad):
            given[name] = Slope.apply(given[name], factor)
        out = attention_quadratic(**given)[0]
        return out * factor if name == "out" else out

    return wrong


def test_right_kernels_pass():
    assert passes(prefill=True) and passes(prefill=False)


def test_the_definition_in_a_kernels_place_passes(monkeypatch):
    monkeypatch.setattr(training, "attention_training", wrong_training("", 1.0))
    assert passes(prefill=False)


@pytest.mark.parametrize("factor", [1.01, torch.nan])
@pytest.mark.parametrize("name", ["out", *INPUTS])
def test_training_with_one_wrong_result_fails(name, factor, monkeypatch):
    monkeypatch.setattr(training, "attention_training", wrong_training(name, factor))
    assert not passes(prefill=False)


@pytest.mark.parametrize("name", ["q_far", "k_far", "gate"])
def test_training_wrong_only_where_q_k_v_are_frozen_fails(name, monkeypatch):
    monkeypatch.setattr(training, "attention_training", wrong_training(name, frozen=True))
    assert not passes(prefill=False)


@pytest.mark.parametrize("name", ["out", "total"])
def test_prefill_with_one_wrong_result_fails(name, monkeypatch):
    right = prefill.attention_prefill

    def wrong(**given):
        out, state = right(**given)
        if name == "total":
            state.total.mul_(1.01)
        return (out * 1.01 if name == "out" else out), state

    monkeypatch.setattr(prefill, "attention_prefill", wrong)
    assert not passes(prefill=True)


def test_prefill_wrong_only_after_a_past_fails(monkeypatch):
    right = prefill.attention_prefill

    def wrong(*, state=None, **given):
        out, after = right(**given, state=state)
        return out if state is None else out * 1.01, after

    assert passes(prefill=True, masked=True, decay=True)
    monkeypatch.setattr(prefill, "attention_prefill", wrong)
    assert passes(prefill=True) and not passes(prefill=True, masked=True)


@pytest.mark.parametrize("what", ["nothing", "valid", "segments", "state"])
def test_every_sort_of_call_has_a_self_test_of_its_own(what, monkeypatch):
    """And where it fails the call is refused: on a GPU that is none, without a kernel."""
    asked = []

    def fails(device, dtype, **sort):
        asked.append(sort)
        return 1.0, 1e-2

    monkeypatch.setattr(self_test, "self_test", fails)
    monkeypatch.setattr(prefill, "why_not", lambda *_, **__: "")  # slices, which a fake tensor may not without a GPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    inputs, options = make(length=80, heads=4, groups=2)
    with FakeTensorMode():
        inputs = {name: torch.empty(x.shape, dtype=x.dtype, device="cuda") for name, x in inputs.items()}
        mask = torch.empty(1, 80, dtype=torch.bool, device="cuda")
        given = {"nothing": {}, "state": {"state": object()}}.get(what, {what: mask})
        verdict = dispatch.can_run(**inputs, **options, **given)
        assert verdict == (False, "the self-test on a GPU is off by 1.0e+00, relative; 1.0e-02 is allowed")
    assert asked[0]["masked"] == (what != "nothing") and asked[0]["prefill"] == (what == "state")


def test_losses_whose_self_test_fails_go_to_the_reference(monkeypatch):
    monkeypatch.setattr(self_test, "self_test_losses", lambda *_, **__: (1.0, 1e-2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(logit_loss_kernels.LogitLosses, "apply", None)
    with FakeTensorMode():
        logits, labels = torch.empty(3, 77, device="cuda"), torch.empty(3, dtype=torch.long, device="cuda")
        assert logit_losses(logits, labels, logits)[0].shape == ()
        with pytest.raises(RuntimeError, match="asked to run in triton, and cannot: the self-test on a GPU is off by"):
            logit_losses(logits, labels, logits, implementation="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", [True, False])
def test_losses_pass_and_fail_by_each_result(dtype, teacher, monkeypatch):
    def agree():
        error, allowed = self_test.self_test_losses.__wrapped__(
            DEVICE, dtype, dtype if teacher else None, vocabulary=150
        )
        return error <= allowed

    assert agree()
    right = logit_loss_kernels.LogitLosses.apply
    for wrong in ("ce", "kl", "gradient") if teacher else ("ce", "gradient"):

        def apply(logits, *others, wrong=wrong):
            ce, kl = right(Slope.apply(logits, 1.05 if wrong == "gradient" else 1.0), *others)
            return ce + (wrong == "ce") * 0.05 * ce.detach(), kl + (wrong == "kl") * 0.05 * kl.detach()

        with monkeypatch.context() as patched:
            patched.setattr(logit_loss_kernels.LogitLosses, "apply", apply)
            assert not agree(), wrong


@pytest.mark.parametrize("setting", ["autocast", "inference_mode", "no_grad"])
def test_a_self_test_is_apart_from_what_its_caller_has_set(setting):
    """Its verdict is kept for all callers of this process."""
    settings = dict(
        autocast=torch.autocast(DEVICE.type, torch.bfloat16), inference_mode=torch.inference_mode(),
        no_grad=torch.no_grad(),
    )  # fmt: skip
    sizes = {name: size for name, size in SIZES.items() if name != "far_heads"}
    launch = choose_launch(2, 41, 16, 16, 2, torch.float32)
    with settings[setting]:
        assert passes(prefill=True) and passes(prefill=False)
        for test, sort in (
            (self_test.self_test_losses, dict(vocabulary=150)),
            (self_test.self_test_decode, dict(launch=launch, splits=1, **sizes)),
        ):
            error, allowed = test.__wrapped__(DEVICE, torch.float32, **sort)
            assert error <= allowed
        assert self_test.maps_agree.__wrapped__(DEVICE, torch.float32, heads=3, head_dim=16, columns=5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_self_test_runs_on_the_device_of_its_tensors():
    inputs, options = make(length=100, device=torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    assert dispatch.can_run(**inputs, **options) and dispatch.can_run_cuda(**inputs, **options, return_state=True)
    assert dispatch.can_run_losses(torch.zeros(3, 77, device="cuda:1"))


@pytest.fixture
def cuda_here(monkeypatch):
    """CUDA kernels in the emulator, as if this were a device that has them."""
    if cuda_emulator.WHY_NOT:
        pytest.skip(cuda_emulator.WHY_NOT)
    if not ON_GPU:
        monkeypatch.setattr(cuda, "why_not", lambda device: "")
        monkeypatch.setattr(cuda, "kernel", cuda_emulator.kernel)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this device")
        for module in (cuda_prefill, cuda_backward):
            monkeypatch.setattr(module, "why_not_device", lambda *_, **__: "")
    self_test.self_test.cache_clear()
    yield
    self_test.self_test.cache_clear()


def scaled(right, place, factor=1.05):
    """`right` with one of its results off."""

    @functools.wraps(right)
    def wrong(*args, **kw):
        results = list(right(*args, **kw))
        results[place] = results[place] * factor
        return tuple(results)

    return wrong


def refused(verdict) -> bool:
    return not verdict and "is off by" in verdict.reason


def test_a_wrong_prefill_in_cuda_is_refused(cuda_here, monkeypatch):
    inputs, options = make(length=100, device=DEVICE)
    assert dispatch.can_run_cuda(**inputs, **options, return_state=True)
    self_test.self_test.cache_clear()
    monkeypatch.setattr(cuda_prefill, "attention_prefill_cuda", scaled(cuda_prefill.attention_prefill_cuda, 0))
    assert refused(dispatch.can_run_cuda(**inputs, **options, return_state=True))
    with pytest.raises(RuntimeError, match="asked to run in cuda, and cannot: the self-test on .* is off by"):
        attention(**inputs, **options, return_state=True, implementation="cuda")


def test_a_wrong_forward_in_cuda_is_refused(cuda_here, monkeypatch):
    inputs, options = make(length=100, device=DEVICE)
    segments = torch.zeros(1, 100, dtype=torch.long, device=DEVICE)
    call = functools.partial(dispatch.can_forward_cuda, **inputs, **options, segments=segments, backward=False)
    monkeypatch.setattr(cuda_prefill, "why_not_forward", lambda *_, **__: "")  # few rows are no reason here
    assert call()
    self_test.self_test.cache_clear()
    monkeypatch.setattr(training, "attention_forward_cuda", scaled(training.attention_forward_cuda, 0))
    assert refused(call())


@pytest.mark.parametrize("map_dim", [4, 16])
@pytest.mark.parametrize("place", range(6), ids=["dq", "dk", "dv", "dq_far", "dk_far", "dgate"])
def test_a_wrong_backward_in_cuda_is_refused(place, map_dim, cuda_here, monkeypatch):
    inputs, options = make(length=64, map_dim=map_dim, batch=132, device=DEVICE)
    if not ON_GPU:  # the interpreter has no products in bfloat16: the definition stands for Triton's forward

        def define(q, k, v, q_far, k_far, gate, *_, scaling, window, sinks, **__):
            tensors = dict(q=q, k=k, v=v, q_far=q_far, k_far=k_far, gate=gate)
            return forward({n: x.detach() for n, x in tensors.items()}, scaling=scaling, window=window, sinks=sinks)

        monkeypatch.setattr(training, "key_sums", lambda *_, **__: (training.no_sums(DEVICE), None))
        monkeypatch.setattr(training, "launch_forward", define)
    assert dispatch.can_backward_cuda(**inputs, **options)
    self_test.self_test.cache_clear()
    right = training.attention_backward_cuda

    def wrong(*args, **kw):
        results = list(right(*args, **kw))
        results[place] = None if results[place] is None else results[place] * 1.05
        return tuple(results)

    monkeypatch.setattr(training, "attention_backward_cuda", wrong)
    assert refused(dispatch.can_backward_cuda(**inputs, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_wrong_triton_kernels_are_refused_and_auto_takes_the_reference(monkeypatch):
    inputs, options = make(length=200, heads=2, size=32, map_dim=5, device=DEVICE)
    expected, _ = attention(**inputs, **options, implementation="reference")
    monkeypatch.setattr(training, "attention_training", wrong_training("out", 1.05))
    self_test.self_test.cache_clear()
    try:
        assert refused(dispatch.can_run(**inputs, **options))
        assert torch.equal(attention(**inputs, **options)[0], expected)
        with pytest.raises(RuntimeError, match="is off by"):
            attention(**inputs, **options, implementation="triton")
    finally:
        self_test.self_test.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_wrong_losses_are_refused_and_auto_takes_the_reference(monkeypatch):
    logits, labels = torch.randn(3, 77, device=DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    right = logit_loss_kernels.LogitLosses.apply

    def wrong(*args):
        return tuple(x * 1.05 for x in right(*args))

    monkeypatch.setattr(logit_loss_kernels.LogitLosses, "apply", wrong)
    self_test.self_test_losses.cache_clear()
    try:
        assert refused(dispatch.can_run_losses(logits))
        assert torch.equal(logit_losses(logits, labels)[0], logit_losses(logits, labels, implementation="reference")[0])
        with pytest.raises(RuntimeError, match="is off by"):
            logit_losses(logits, labels, implementation="triton")
    finally:
        self_test.self_test_losses.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_gpus_report_has_a_kernel_for_every_operation():
    for name, implementation, why in report.report("cuda", window=192, map_dim=4):
        assert implementation in ("cuda", "triton") and why.startswith("the self-test passed"), (name, why)


@pytest.mark.parametrize("choice", ["reference", "triton", "cuda"])
def test_the_report_says_what_was_asked_for(choice, monkeypatch):
    monkeypatch.setenv("LINEARIZE_KERNELS", choice)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rows = report.report("cpu")
    assert len(rows) == 9
    for name, implementation, why in rows:
        if "backward" in name:
            assert implementation == "as forward"
        elif choice == "reference":
            assert implementation == "reference" and why == "it is asked for", name
        else:
            assert implementation == choice and why.startswith("asked for, and cannot run: "), name
            wanted = {"triton": "Triton needs a CUDA GPU", "cuda": "CUDA needs an NVIDIA GPU"}[choice]
            if choice == "cuda" and "losses" in name:
                wanted = "there is no CUDA kernel, Triton has one"
            assert why.endswith(wanted) and not why.partition(": ")[2].startswith("not "), why
