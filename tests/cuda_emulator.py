"""Builds a CUDA source with g++ for cuda_on_cpu.h, and runs its kernels as `linearize_kernels.cuda` does."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from linearize_kernels import cuda

HERE = Path(__file__).parent
WHY_NOT = "" if shutil.which("g++") else "g++ is not installed"
OPTIONS = ["-std=c++17", "-O2", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing",
           "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]  # fmt: skip
KERNEL = re.compile(r"__global__ void (?:__launch_bounds__\(.*?\)\s+)?(\w+)\(")
MESSAGE = """
extern "C" const char* emulated_message() { return emulator::message; }
extern "C" int emulated_static_bytes() {
    using namespace emulator;
    return __start_shared_memory ? __stop_shared_memory - __start_shared_memory : 0;
}
"""
LAUNCH = """
extern "C" int emulated_launch_%s(const int* size, int shared, int reverse, void** args) {
    return emulator::launch(%s, size, shared, reverse, args);
}
"""


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="cuda-on-cpu-"))


class EmulatedKernel:
    """A kernel on CPU tensors. reverse: threads run in the opposite order, which must change nothing.

    static_bytes: of shared memory that the kernels of its file declare.
    """

    registers = spills = 0

    def __init__(self, file: str, name: str, defines: dict, shared_bytes: int, reverse: bool):
        code = '#include "cuda_on_cpu.h"\n' + cuda.source(file) + MESSAGE  # all kernels of a file at once
        code += "".join(LAUNCH % (found, found) for found in KERNEL.findall(code))
        options = OPTIONS + [f"-D{key}={value}" for key, value in defines.items()]
        stem = _folder() / hashlib.sha256(f"{code}{options}".encode()).hexdigest()[:16]
        if not stem.with_suffix(".so").exists():
            stem.with_suffix(".cpp").write_text(code)
            command = ["g++", *options, f"-I{HERE}", "-o", f"{stem}.so", f"{stem}.cpp"]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
        self.library = ctypes.CDLL(f"{stem}.so")
        self.library.emulated_message.restype = ctypes.c_char_p
        self.static_bytes = self.library.emulated_static_bytes()
        self.launch = self.library[f"emulated_launch_{name}"]
        self.shared_bytes, self.reverse = shared_bytes, reverse

    def __call__(self, grid, block, *args, early=False):
        """As `cuda.Kernel.__call__`, but never early. Raises RuntimeError with what went wrong."""
        size = (ctypes.c_int * 6)(*grid, *block)
        values, pointers = cuda.pack(args)
        if self.launch(size, self.shared_bytes, int(self.reverse), pointers):
            raise RuntimeError(self.library.emulated_message().decode())


def kernel(file: str, name: str, defines: dict | None = None, shared_bytes: int = 0, *, device=None, reverse=False):
    """Stands in for `cuda.kernel`."""
    return _kernel(file, name, tuple(sorted((defines or {}).items())), shared_bytes, reverse)


@functools.cache
def _kernel(file, name, defines, shared_bytes, reverse):
    return EmulatedKernel(file, name, dict(defines), shared_bytes, reverse)
