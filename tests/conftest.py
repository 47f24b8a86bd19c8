"""Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported.

Under `pytest -n`, each process keeps to one thread: they share the cores already.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
