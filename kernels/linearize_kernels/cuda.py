"""CUDA C++ kernels, compiled on first use by NVRTC, which torch brings along: no toolkit is needed.

`kernel(...)` gives a kernel compiled for the current device, which is launched on torch's current stream and can
be captured in a CUDA graph. A source stands beside this file; it includes nothing but files beside it. Machine code is
kept on disk (disk_cache.py) under a hash of all that it is made of.
"""

import ctypes
import functools
import hashlib
import json
import re
from pathlib import Path

import torch

from .disk_cache import cache_folder, kept

HERE = Path(__file__).parent
OLDEST = (8, 0)  # compute capability: cp.async and bfloat16 products
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


class CudaError(RuntimeError):
    """A call of NVRTC or of the driver failed; the message says which, and shows the compiler's log."""


@functools.cache
def why_not(device: torch.device | str) -> str:
    """Why CUDA kernels cannot be compiled for a device; empty where they can."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device.type}; CUDA needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "cuda.bindings is not installed (it comes with torch for CUDA 13: pip install cuda-bindings)"
    try:
        arch, known = _arch_number(device), _checked("nvrtc", "nvrtcGetSupportedArchs")
    except RuntimeError as error:  # its library is not found, or too old
        return f"NVRTC: {error}"
    newest = max(known[1] if isinstance(known, tuple) else known)  # cuda.bindings before 13.3 give a count, too
    return "" if arch <= newest else f"NVRTC compiles up to sm_{newest}, and the GPU is sm_{arch}"


def kernel(
    file: str, name: str, defines: dict | None = None, shared_bytes: int = 0, *, device: int | None = None
) -> "Kernel":
    """The kernel `name` of a source, compiled and loaded on the first call.

    defines: what the preprocessor shall know. shared_bytes: dynamic shared memory of a block. device: a number, or
    None for the current device.
    Raises CudaError where it does not compile, and while a graph is captured if it is not compiled yet.
    """
    device = torch.cuda.current_device() if device is None else device
    return _kernel(file, name, tuple(sorted((defines or {}).items())), shared_bytes, device)


@functools.cache
def _kernel(file, name, defines, shared_bytes, device):
    if torch.cuda.is_current_stream_capturing():
        raise CudaError(f"{file}: {name} is not compiled yet, and a graph is captured: call it once before")
    with torch.cuda.device(device):
        return Kernel(file, name, dict(defines), shared_bytes, torch.device("cuda", device))


class Kernel:
    """A compiled kernel on one device. registers: of a thread; spills: bytes of a thread's local memory."""

    def __init__(self, file: str, name: str, defines: dict, shared_bytes: int, device: torch.device):
        from cuda.bindings import driver

        torch.zeros(1, device=device)  # the device's context is there, and current
        self.driver, self.push, self.pop = driver, driver.cuCtxPushCurrent, driver.cuCtxPopCurrent
        self.may_overlap = torch.cuda.get_device_capability(device) >= (9, 0)
        self.name, self.shared_bytes, self.device = f"{file}: {name}", shared_bytes, device
        self.get_context, self.context = driver.cuCtxGetCurrent, _checked("driver", "cuCtxGetCurrent")
        self.module = _checked("driver", "cuModuleLoadData", compiled(file, defines, _arch(device)))
        self.function = _checked("driver", "cuModuleGetFunction", self.module, name.encode())
        attributes = driver.CUfunction_attribute
        largest = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked("driver", "cuFuncSetAttribute", self.function, largest, shared_bytes)
        if shared_bytes:  # as much of a multiprocessor's cache as can be: several blocks shall fit
            carveout = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked("driver", "cuFuncSetAttribute", self.function, carveout, 100)
        self.registers, self.spills = (
            _checked("driver", "cuFuncGetAttribute", attribute, self.function)
            for attribute in (attributes.CU_FUNC_ATTRIBUTE_NUM_REGS, attributes.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
        )

    def __call__(self, grid, block, *args, early: bool = False) -> None:
        """Launches on the device's current stream. grid, block: (x, y, z); args as `pack` takes them.

        early: it may begin before the launch before it has ended (on Hopper and later), as its source waits for that
        itself (primitives.cuh).
        """
        values, pointers = pack(args)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        elsewhere = int(self.get_context()[1]) != int(self.context)  # a new thread, or another device is current
        if elsewhere:
            self.push(self.context)
        sizes = *grid, *block, self.shared_bytes, stream
        launch = self._launch_early if early and self.may_overlap else self.driver.cuLaunchKernel
        (code,) = launch(self.function, *sizes, ctypes.addressof(pointers), 0)
        if elsewhere:
            self.pop()
        if code:
            raise CudaError(f"{self.name}: cuLaunchKernel: {code.name}")

    def _launch_early(self, function, x, y, z, block_x, block_y, block_z, shared_bytes, stream, pointers, extra):
        attribute, config = self.driver.CUlaunchAttribute(), self.driver.CUlaunchConfig()
        attribute.id = self.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.blockDimX, config.blockDimY, config.blockDimZ = block_x, block_y, block_z
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        config.attrs, config.numAttrs = [attribute], 1
        return self.driver.cuLaunchKernelEx(config, function, pointers, extra)


def pack(args) -> tuple[list, ctypes.Array]:
    """(values, pointers to them): tensors as addresses, None as 0, int (and bool) as int32, float as float32."""
    values = []
    for x in args:
        if isinstance(x, torch.Tensor):
            values.append(ctypes.c_void_p(x.data_ptr()))
        elif isinstance(x, float):
            values.append(ctypes.c_float(x))
        elif isinstance(x, int):
            assert -(2**31) <= x < 2**31, f"{x} is no int32"
            values.append(ctypes.c_int32(x))
        else:
            assert x is None, f"a kernel's argument of type {type(x).__name__}"
            values.append(ctypes.c_void_p())
    return values, (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))


def source(file: str) -> str:
    """The text of a source, with the files that it includes in their place."""
    text = (HERE / file).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: source(found[1]), text)


def compiled(file: str, defines: dict, arch: str) -> bytes:
    """Machine code of a source for an architecture such as "sm_90a", from disk if it was compiled before.

    Needs no GPU. Raises CudaError with the compiler's log.
    """
    text, version = source(file), _checked("nvrtc", "nvrtcVersion")
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    key = hashlib.sha256(json.dumps([file, text, options, version]).encode()).hexdigest()
    path = cache_folder() / "cubins" / f"{Path(file).stem}-{arch}-{key[:32]}"
    return kept(path, lambda: compile_source(text, options, name=file))


def compile_source(text: str, options: list[str], *, name: str) -> bytes:
    """Machine code by NVRTC. Raises CudaError with the log, which calls the source `name`."""
    from cuda.bindings import nvrtc

    program = _checked("nvrtc", "nvrtcCreateProgram", text.encode(), name.encode(), 0, [], [])
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if code:
        log = bytearray(_checked("nvrtc", "nvrtcGetProgramLogSize", program))
        _checked("nvrtc", "nvrtcGetProgramLog", program, log)
        raise CudaError(f"{name} does not compile with {' '.join(options)}: {log.decode(errors='replace')}")
    cubin = bytearray(_checked("nvrtc", "nvrtcGetCUBINSize", program))
    _checked("nvrtc", "nvrtcGetCUBIN", program, cubin)
    _checked("nvrtc", "nvrtcDestroyProgram", program)
    return bytes(cubin)


def _arch_number(device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _arch(device) -> str:
    number = _arch_number(device)
    return f"sm_{number}" + ("a" if number >= 90 else "")


def _checked(library: str, function: str, *args):
    """What a call gives: nothing, a value or a tuple. Raises CudaError where it fails."""
    from cuda.bindings import driver, nvrtc

    code, *results = getattr({"driver": driver, "nvrtc": nvrtc}[library], function)(*args)
    if code:
        raise CudaError(f"{function}: {code.name}")
    return results[0] if len(results) == 1 else tuple(results) or None
