"""Cross-entropy and KL in Triton against torch in float64. Without a GPU in Triton's interpreter (see conftest.py)."""

import pytest
import torch

from linearize_kernels.logit_losses import logit_losses, logit_losses_reference

pytest.importorskip("triton", reason="Triton is not installed")
from linearize_kernels import logit_loss_kernels  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a row, the last of them not full."""
    monkeypatch.setattr(logit_loss_kernels, "BLOCK", 64)


def make(tokens=5, vocabulary=150, large=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(tokens, vocabulary, generator=g) * large for _ in range(2))
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    labels[1], labels[-1] = -100, vocabulary - 1
    return [x.to(DEVICE, dtype) for x in (logits, teacher)], labels.to(DEVICE)


def run(function, logits, labels, teacher, ce_weight, kl_weight):
    logits = logits.detach().clone().requires_grad_()
    ce, kl = function(logits, labels, teacher)
    (ce_weight * ce + kl_weight * kl).backward()
    return ce.detach(), kl.detach(), logits.grad


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "large"), [(150, 1.0), (64, 1.0), (3, 1.0), (150, 60.0)])
def test_losses_and_gradients(vocabulary, large, dtype, with_teacher):
    (logits, teacher), labels = make(vocabulary=vocabulary, large=large, dtype=dtype)
    teacher = teacher if with_teacher else None
    weights = (0.3, 0.7) if with_teacher else (0.3, 0.0)
    as_double = None if teacher is None else teacher.double()
    exact = run(logit_losses_reference, logits.double(), labels, as_double, *weights)
    got = run(lambda *args: logit_losses(*args, implementation="triton"), logits, labels, teacher, *weights)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3 if ON_GPU else 8e-3  # the interpreter cuts bits off
    error = (got[2].double() - exact[2]).norm() / exact[2].norm()
    assert error < tolerance
    assert got[2][1].abs().max() == 0, "a token without a label pulls at its logits"


def test_the_rows_of_a_larger_tensor():
    """Logits whose rows do not lie side by side, and whose columns do not."""
    (logits, teacher), labels = make()
    wide = torch.full((len(logits), 400), torch.nan, device=DEVICE)
    wide[:, 100:250] = logits
    tall = teacher.t().contiguous().t()
    exact = run(logit_losses_reference, logits, labels, teacher, 1.0, 1.0)
    ce, kl = logit_losses(wide[:, 100:250], labels, tall, implementation="triton")
    torch.testing.assert_close(torch.stack([ce, kl]), torch.stack(exact[:2]), rtol=1e-5, atol=1e-5)


def test_an_implementation_that_there_is_not():
    (logits, teacher), labels = make()
    with pytest.raises(ValueError, match="choose one of"):
        logit_losses(logits, labels, teacher, implementation="fast")
    for choice, dtype in (("cuda", torch.float32), ("triton", torch.float64)):
        with pytest.raises(RuntimeError, match=f"asked to run in {choice}"):
            logit_losses(logits.to(dtype), labels, implementation=choice)
