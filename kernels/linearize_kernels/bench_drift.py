"""How far the far term drifts where `decode` keeps its sum in bfloat16: `python -m linearize_kernels.bench_drift`.

G heads, F Taylor features, V value dim, d map dim

The sum is kept as the decode kernels keep it, in their order and scale of features, and rounded after every fold of 32
tokens (the tests hold it against a kernel's own). Keys, queries and values are random; values may share a mean: then
the sum grows with the text, until what a fold adds is less than half a step of bfloat16. It runs on a CPU. Printed is
the relative RMS error of the far term alone, Σ T(x) v / Σ T(x), against float64.
"""

import argparse
import itertools

import torch

from .bench_measure import relative
from .decode import FOLD, feature_order
from .feature_maps import Taylor

HEADS, VALUE_DIM, QUERIES = 4, 64, 64


def key_features(k_far):
    """[..., d] -> [..., F], in the order and scale of a `DecodeState`'s sum."""
    order, weight = feature_order(k_far.shape[-1], k_far.device)
    return Taylor.expand(k_far)[..., order] * weight


def query_features(q_far):
    """[..., d] -> [..., F]; with `key_features` of another vector they give T of their product."""
    order, weight = feature_order(q_far.shape[-1], q_far.device)
    return Taylor.expand(q_far)[..., order] / weight


def fold(total, features, v, kept: float = 1.0):
    """The sum [G, F, V] after tokens with features [G, n, F] and values [G, n, V], rounded to its dtype.

    kept: what a decay leaves of the older tokens. Adds up in float32, or in float64 where the sum is.
    """
    wide = torch.float64 if total.dtype == torch.float64 else torch.float32
    return (total.to(wide) * kept + features.to(wide).mT @ v.to(wide)).to(total.dtype)


def drift(dtype, *, map_dim: int, mean: float, log_decay: float = 0.0, lengths: list[int]) -> list[float]:
    """Relative error of the far term with a sum in `dtype`, at each length (rising multiples of FOLD)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(HEADS, *size, generator=generator)

    queries, kept = query_features(draw(QUERIES, map_dim) * 0.5).double(), torch.tensor(log_decay * FOLD).exp().item()
    num_features = queries.shape[-1]
    exact = torch.zeros(HEADS, num_features, VALUE_DIM, dtype=torch.float64)
    norm, total, errors = torch.zeros_like(exact[..., :1]), exact.to(dtype), []
    for count in range(FOLD, lengths[-1] + 1, FOLD):
        features, v = key_features(draw(FOLD, map_dim) * 0.5), (draw(FOLD, VALUE_DIM) + mean).bfloat16()
        exact, total = (fold(x, features, v, kept) for x in (exact, total))
        norm = fold(norm, features, torch.ones(HEADS, FOLD, 1), kept)
        if count in lengths:
            right, got = (queries @ x.double() / (queries @ norm) for x in (exact, total))
            errors.append(relative(got, right))
    return errors


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map-dims", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--means", type=float, nargs="+", default=[0.0, 0.3, 1.0], help="of values of deviation 1")
    parser.add_argument("--decays", type=float, nargs="+", default=[0.0, -1e-3], help="logs a token")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**i for i in range(10, 17)], help="rising")
    choice = parser.parse_args(argv)
    print(f"{'map dim':>8}{'mean':>6}{'decay':>8}  sum{'':8}" + "".join(f"{length:>9}" for length in choice.lengths))
    for map_dim, mean, log_decay in itertools.product(choice.map_dims, choice.means, choice.decays):
        for dtype in (torch.bfloat16, torch.float32):
            errors = drift(dtype, map_dim=map_dim, mean=mean, log_decay=log_decay, lengths=choice.lengths)
            start = f"{map_dim:8}{mean:6}{log_decay:8}  {str(dtype).removeprefix('torch.'):11}"
            print(start + "".join(f"{error:9.1e}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
