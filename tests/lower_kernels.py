"""Lowers launches of Triton kernels for an H100, without a GPU: run as a program by test_kernel_compiles.py.

Triton decides when it is imported whether it compiles or interprets, so that a process which interprets cannot. Reads
a list of launches as JSON from stdin, writes what went wrong with each ("" where nothing did) to stdout.

    python lower_kernels.py ttir|cubin < launches.json
"""

import importlib
import json
import sys
import traceback

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

H100 = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "maxnreg")
INT32 = range(-(2**31), 2**31)


@triton.jit
def faulty_kernel(x, out, count):
    """In float32 it is right; in bfloat16 the branch gives `total` another type."""
    total = tl.zeros([16], tl.float32)
    if count > 0:
        total = tl.load(x + tl.arange(0, 16))
    tl.store(out + tl.arange(0, 16), total)


def source_of(kernel, arguments: list, constants: dict) -> ASTSource:
    """What Triton compiles for a launch: it knows whole numbers that are 1, and what 16 divides."""
    signature, known, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        value = constants[name] if parameter.is_constexpr else arguments[i]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_int and value == 1 and not parameter.do_not_specialize):
            signature[name], known[name] = "constexpr", value
            continue
        if isinstance(value, dict):
            signature[name], divisible = value["type"], value["aligned"]
        elif is_int:
            signature[name] = "i32" if value in INT32 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            raise TypeError(f"{name} is {value!r}: not a kind of argument that is known here")
        if divisible:
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, known, attributes)


def lower(source: ASTSource, settings: dict, stage: str):
    """Raises what Triton raises where a source does not compile."""
    if stage == "cubin":
        assert triton.compile(source, target=H100, options=settings).asm["cubin"], "an empty cubin"
        return
    backend, context = make_backend(H100), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(settings)
    module = source.make_ir(
        H100, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    assert f"@{source.name}" in str(module), "the kernel is not in what was lowered"


def error_of(launch: dict, stage: str, seen: dict[str, str]) -> str:
    """What is wrong with a launch; seen: what was with others, by all that matters to Triton."""
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    constants = launch["constants"]
    settings = {name: constants.pop(name) for name in OPTIONS if name in constants}
    assert constants.keys() == {p.name for p in kernel.params if p.is_constexpr}, "not the kernel's constants"
    source = source_of(kernel, launch["arguments"], constants)
    key = repr((launch["kernel"], source.signature, source.constants, source.attrs, settings))
    if key not in seen:
        try:
            lower(source, settings, stage)
            seen[key] = ""
        except Exception as error:  # of many sorts, from many layers: each is an answer
            seen[key] = "".join(traceback.format_exception(error, limit=0)).strip()
    return seen[key]


if __name__ == "__main__":
    seen = {}
    json.dump([error_of(launch, sys.argv[1], seen) for launch in json.load(sys.stdin)], sys.stdout)
