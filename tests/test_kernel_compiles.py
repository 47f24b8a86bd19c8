"""Every Triton kernel compiles for an H100 as it is launched, without a GPU, in bfloat16 and float32.

Triton's interpreter, in which a CPU runs the kernels, has no types to disagree and no bfloat16 products. Here the
launches of a table of calls are written down instead of run, and lower_kernels.py lowers them in another process:
to Triton's own representation, which finds what does not fit in types and shapes; a few, slowly, down to machine code.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import linearize_kernels  # noqa: E402
from linearize_kernels import State  # noqa: E402
from linearize_kernels.configs import CONFIGS, SumTiles, Tiles, config_for  # noqa: E402
from linearize_kernels.decode import DecodeState, feature_pairs, launch_decode  # noqa: E402
from linearize_kernels.logit_loss_kernels import LogitLosses  # noqa: E402
from linearize_kernels.map_heads import map_heads  # noqa: E402
from linearize_kernels.prefill import attention_prefill  # noqa: E402
from linearize_kernels.training import attention_training  # noqa: E402

HOME = Path(linearize_kernels.__file__).parent
PROGRAM = Path(__file__).with_name("lower_kernels.py")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LAUNCH = re.compile(r"(\w+)\[\(.*\)\]\($", re.MULTILINE)
TYPES = {**DTYPES, torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}

# Texts by what sets them apart; what is not said is as in `draw`. chunks: so many of the dtype, beyond the window.
TRAINING = {
    "plain": dict(),
    "window 192": dict(window=192),
    "one span": dict(chunks=1),
    "short": dict(length=90),
    "segments": dict(cuts=(300, 700)),
    "short segments": dict(length=90, cuts=(30, 50)),
    "padding": dict(pad=100),
    "decay": dict(decay=True),
    "decay, segments": dict(decay=True, cuts=(300, 700)),
    "one query head a kv head": dict(heads=2),
    "one kv head": dict(groups=1),
    "far heads a query head": dict(far_heads=4),
    "far heads a query head, segments": dict(far_heads=4, cuts=(300, 700)),
    "far heads a query head, decay": dict(far_heads=4, decay=True),
    "far heads a query head, short": dict(far_heads=4, length=90),
    "map dim 4": dict(map_dim=4),
    "map dim 4, far heads a query head": dict(map_dim=4, far_heads=4),
    "head dim 128": dict(head_dim=128),
    "head dim 48": dict(head_dim=48),
    "float32 map and gate": dict(far_dtype=torch.float32),
    "frozen": dict(frozen=True),
    "frozen, far heads a query head": dict(frozen=True, far_heads=4),
    "inference": dict(training=False),
    "inference, decay": dict(training=False, decay=True),
    "inference, segments": dict(training=False, cuts=(300, 700)),
}
PREFILL = {
    "plain": dict(),
    "short": dict(length=90),
    "padding": dict(pad=100),
    "decay": dict(decay=True),
    "after a past": dict(past=True),
    "after a past, decay": dict(past=True, decay=True),
    "map dim 4, window 192": dict(map_dim=4, window=192),
    "head dim 128": dict(head_dim=128),
    "head dim 128, after a past": dict(head_dim=128, past=True),
    "float32 map and gate": dict(past=True, far_dtype=torch.float32),
}
DECODE = {
    "plain": dict(),
    "decay": dict(decay=True),
    "many programs": dict(batch=64),
    "window 192": dict(window=192),
    "map dim 4": dict(map_dim=4),
    "one query head a kv head": dict(heads=2),
    "three query heads a kv head": dict(heads=6),
    "head dim 128": dict(head_dim=128),
    "float32 map and gate": dict(far_dtype=torch.float32),
    "sum in bfloat16": dict(sum_dtype=torch.bfloat16),
}
MAPS = {"plain": dict(), "a batch": dict(batch=40), "wide": dict(head_dim=256, map_dim=32), "odd": dict(head_dim=48)}
LOSSES = {"labels": dict(teacher=False), "teacher": dict(teacher=True), "padded": dict(teacher=True, vocabulary=49152)}


def draw(dtype, *, length=1100, chunks=None, batch=1, heads=4, groups=2, far_heads=None, head_dim=64, map_dim=16,
         window=64, decay=False, far_dtype=None):  # fmt: skip
    """Tensors and options of a call."""
    far_heads, far_dtype = far_heads or groups, far_dtype or dtype
    if chunks:
        length = window + chunks * config_for(dtype, head_dim).chunk + 8
    sizes = [(heads, head_dim), (groups, head_dim), (groups, head_dim), (heads, map_dim), (far_heads, map_dim)]
    q, k, v, q_far, k_far = (torch.randn(batch, length, *size).transpose(1, 2) for size in sizes)
    gate = torch.randn(batch, heads, length)
    tensors = *(x.to(dtype) for x in (q, k, v)), *(x.to(far_dtype) for x in (q_far, k_far, gate))
    log_decay = -torch.rand(far_heads) if decay else None
    return tensors, dict(scaling=head_dim**-0.5, window=window, sinks=4, log_decay=log_decay)


def mask(length: int, pad: int):
    return torch.arange(length).expand(1, -1) >= pad if pad else None


def train(dtype, *, training=True, frozen=False, cuts=(), pad=0, **sizes):
    tensors, options = draw(dtype, **sizes)
    length, segments = tensors[0].shape[2], None
    if cuts:
        segments = torch.zeros(1, length, dtype=torch.long)
        segments[:, list(cuts)] = 1
        segments = segments.cumsum(1)
    tensors = [x.requires_grad_(training and not (frozen and i < 3)) for i, x in enumerate(tensors)]
    if training and options["log_decay"] is not None:
        tensors.append(options["log_decay"].requires_grad_())
    out = attention_training(
        *tensors[:6], **options, valid=mask(length, pad), segments=segments, forward="triton", backward="triton"
    )
    if training:
        torch.autograd.grad(out, [x for x in tensors if x.requires_grad], torch.ones_like(out))


def empty_state(k, v, k_far, *, ring: int):
    num_features = feature_pairs(k_far.shape[-1], k.device).shape[1]
    return State.empty(k, v, k_far, num_features=num_features, sinks=4, ring=ring)


def prefill(dtype, *, pad=0, past=False, **sizes):
    tensors, options = draw(dtype, **sizes)
    state = empty_state(*tensors[1:3], tensors[4], ring=options["window"] - 1) if past else None
    attention_prefill(*tensors, **options, valid=mask(tensors[0].shape[2], pad), state=state)


def decode(dtype, *, sum_dtype=torch.float32, **sizes):
    tensors, options = draw(dtype, length=1, **sizes)
    q, k, v, _, k_far, _ = tensors
    window = options["window"]
    state = DecodeState.from_state(empty_state(k, v, k_far, ring=window - 1), window=window, dtype=sum_dtype)
    launch_decode(*tensors, state, options["scaling"], options["log_decay"], q.new_empty(*q.shape[:-1], v.shape[-1]))


def map_(dtype, *, batch=1, heads=6, head_dim=64, map_dim=16):
    x = torch.randn(batch, heads, 1, head_dim, dtype=dtype)
    map_heads(x, *(torch.randn(heads, n, map_dim + 1) for n in (head_dim, 1)))


def lose(dtype, *, teacher: bool, vocabulary=151):
    logits = torch.randn(3, vocabulary).to(dtype).requires_grad_()
    ce, kl = LogitLosses.apply(logits, torch.tensor([0, -100, 7]), logits.detach() if teacher else None)
    (ce + kl).backward()


CALLS = [(train, TRAINING), (prefill, PREFILL), (decode, DECODE), (map_, MAPS), (lose, LOSSES)]


class Recorder:
    """In a kernel's place: writes its launches down, as lower_kernels.py reads them."""

    def __init__(self, module: str, kernel: str, launches: list[str]):
        self.module, self.kernel, self.launches = module, kernel, launches

    def __getitem__(self, grid):
        return self.record

    def record(self, *arguments, **constants):
        arguments = [self.describe(x) for x in arguments]
        launch = dict(module=self.module, kernel=self.kernel, arguments=arguments, constants=constants)
        self.launches.append(json.dumps(launch))

    @staticmethod
    def describe(x):
        return dict(type="*" + TYPES[x.dtype], aligned=x.data_ptr() % 16 == 0) if torch.is_tensor(x) else x


def record_kernels(monkeypatch) -> tuple[list[str], set[str]]:
    """Puts recorders in the place of all kernels there are: (the launches to come, the kernels' names)."""
    launches, names = [], set()
    for path in sorted(HOME.glob("*_kernels.py")):
        module = importlib.import_module(f"linearize_kernels.{path.stem}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            assert name not in names, "two kernels of one name"
            monkeypatch.setattr(module, name, Recorder(module.__name__, name, launches))
            names.add(name)
    launched = {name for path in HOME.glob("*.py") for name in LAUNCH.findall(path.read_text(encoding="utf-8"))}
    assert launched == names, "a kernel that is launched and not named or placed as the others are, or never launched"
    return launches, names


def lower(launches: list[str], stage: str, cache: Path) -> dict[str, str]:
    """What goes wrong with each launch."""
    paths = [str(HOME.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, str(PROGRAM), stage], input=f"[{','.join(launches)}]", capture_output=True, text=True, env=env
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(launches, json.loads(result.stdout), strict=True))


def record(monkeypatch, dtype, tables) -> tuple[dict[str, list[str]], set[str]]:
    """Each launch of the tables' calls, with the calls that make it; and all kernels there are."""
    launches, kernels = record_kernels(monkeypatch)
    calls = {}
    for call, table in tables:
        for name, case in table.items():
            launches.clear()
            call(dtype, **case)
            assert launches, "a call that launches nothing"
            for launch in launches:
                calls.setdefault(launch, []).append(f"{call.__name__}, {name}")
    return calls, kernels


def check_errors(errors: dict[str, str], calls: dict[str, list[str]]):
    failed = {}  # error -> whose
    for launch, error in errors.items():
        failed.setdefault(error, []).append(f"{json.loads(launch)['kernel']} ({'; '.join(calls[launch])})")
    failed.pop("", None)
    assert not failed, "\n\n".join("\n".join([*launches, error]) for error, launches in failed.items())


def check_coverage(launches: list[dict], kernels: set[str], dtype):
    """The table reaches every kernel, with each of its switches on and off."""
    assert {launch["kernel"] for launch in launches} == kernels
    for kernel in kernels:
        constants = [launch["constants"] for launch in launches if launch["kernel"] == kernel]
        for name in [name for name, value in constants[0].items() if isinstance(value, bool)]:
            wanted = {False, True}
            if name == "REST":  # what rounding lost: in bfloat16, wherever gradients are wanted
                wanted = {False} if dtype == torch.float32 else {True} if "gradient" in kernel else wanted
            assert {each[name] for each in constants} == wanted, f"{name} of {kernel}"


def check_configs(calls: dict[str, list[str]], dtype):
    """Training and prefill are launched with the tiles of every entry of CONFIGS."""
    for name in ("train", "prefill"):
        made = [json.loads(launch) for launch, callers in calls.items() if any(c.startswith(name) for c in callers)]
        for config in (config for (other, _), config in CONFIGS.items() if other == dtype):
            wanted = {"forward": config.forward}
            if name == "train":
                wanted |= {"query_gradient": config.query_gradient, "key_gradient": config.key_gradient}
            for kernel, tiles in wanted.items():
                sizes = [each["constants"] for each in made if each["kernel"] == f"{kernel}_kernel"]
                assert tiles in [tiles_of(constants) for constants in sizes], f"{kernel} of {name}: {tiles}"
            sums = [each["constants"] for each in made if each["kernel"] == "feature_sums_kernel"]
            tiles = [SumTiles(*(c[n] for n in ("FB", "BN", "num_warps", "num_stages"))) for c in sums]
            assert config.sums in tiles, f"sums of {name}: {config.sums}"


def tiles_of(constants: dict) -> Tiles:
    return Tiles(*(constants[n] for n in ("BM", "BN", "FB", "num_warps", "num_stages")), constants.get("maxnreg"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_launch_lowers(dtype, monkeypatch, tmp_path):
    calls, kernels = record(monkeypatch, dtype, CALLS)
    check_coverage([json.loads(launch) for launch in calls], kernels, dtype)
    check_configs(calls, dtype)
    faulty = []
    x = torch.zeros(16, dtype=dtype)
    Recorder("lower_kernels", "faulty_kernel", faulty).record(x, x, 2)
    errors = lower([*calls, *faulty], "ttir", tmp_path)
    fault = errors.pop(faulty[0])
    assert ("`total`" in fault) == (dtype == torch.bfloat16), f"a type error is found where there is one: {fault}"
    check_errors(errors, calls)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_machine_code(dtype, monkeypatch, tmp_path):
    names = {
        train: ["plain", "far heads a query head", "inference, decay"], prefill: ["after a past"],
        decode: ["plain", "many programs"], map_: ["plain", "a batch"], lose: ["teacher"],
    }  # fmt: skip
    tables = [(call, {name: table[name] for name in names[call]}) for call, table in CALLS]
    calls, kernels = record(monkeypatch, dtype, tables)
    assert {json.loads(launch)["kernel"] for launch in calls} == kernels
    check_errors(lower([*calls], "cubin", tmp_path), calls)
