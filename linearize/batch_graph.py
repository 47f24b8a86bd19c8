"""A training micro-batch as one CUDA graph: forward, losses and backward with a single launch, not thousands.

A small model's kernels are shorter than the host takes to launch them; recorded once, they follow each other without
it. Gradients add up in the parameters' `.grad`, which must stay the same tensors.
"""

import torch

from .errors import TrainingError

LONGEST = 8192  # tokens of a row: a mask of all pairs takes 128 MB in bfloat16
WARM_UP = 3  # micro-batches that run as they are first: kernels are compiled and tested in them, buffers made


def why_not(device: torch.device, model, sequences, settings) -> str:
    """Why a stage's micro-batches of `sequences` cannot be recorded, by its section of the recipe. Empty: they can."""
    if device.type != "cuda":
        return f"it runs on {device.type}"
    if not sequences.packing:
        return "data.packing is false, so that hardly two micro-batches have one length"
    if sequences.sequence_length > LONGEST:
        return f"rows of {sequences.sequence_length} tokens: above {LONGEST} the masks that it always makes cost more"
    if settings.window_dropout:
        return "window_dropout changes what is computed from one micro-batch to the next"
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "run.gradient_checkpointing reads the state of random numbers in between"
    return ""


class NotRecorded(TrainingError):
    """Something in a micro-batch cannot be recorded, as what waits for the device. The micro-batch has not run."""


class BatchGraph:
    """Calls `run(batch, scale=...)` -> figures, by a recording from the fourth micro-batch of one shape on.

    batch: tensors by name; scale, figures: scalars on the device. Figures are overwritten by the next call. Raises
    NotRecorded, once, at that fourth.
    """

    def __init__(self, run, device: torch.device):
        self.run, self.stream = run, torch.cuda.Stream(device)  # warm-ups and the recording are on this stream
        self.graph, self.num_warm, self.inputs, self.figures = None, {}, {}, {}

    def __call__(self, batch: dict[str, torch.Tensor], *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {**batch, "scale": scale}
        shapes = tuple((name, tensor.shape) for name, tensor in given.items())
        if self.graph is None and self.num_warm.get(shapes, 0) >= WARM_UP:
            self._record(given)
        if self.graph is None or shapes != self.shapes:
            self.num_warm[shapes] = self.num_warm.get(shapes, 0) + 1
            return self._run_aside(batch, scale)
        for name, tensor in given.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.figures

    def _run_aside(self, batch, scale):
        """Unrecorded, on the stream that will record: what autograd and cuBLAS keep by stream is then that one's."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            figures = self.run(batch, scale=scale)
        current.wait_stream(self.stream)
        return figures

    def _record(self, given) -> None:
        inputs = {name: tensor.clone() for name, tensor in given.items()}
        graph, batch = torch.cuda.CUDAGraph(), {name: t for name, t in inputs.items() if name != "scale"}
        generator = torch.cuda.default_generators[self.stream.device.index]
        before = generator.clone_state()
        try:
            self._rehearse(batch)
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                figures = self.run(batch, scale=inputs["scale"])
        except (RuntimeError, TrainingError) as error:  # the latter, of a compiler that fails here
            generator.graphsafe_set_state(before)  # a recording that failed leaves it as if there still were one
            raise NotRecorded(str(error).strip().partition("\n")[0]) from error
        self.shapes = tuple((name, tensor.shape) for name, tensor in inputs.items())
        self.graph, self.inputs, self.figures = graph, inputs, figures

    def _rehearse(self, batch) -> None:
        """Runs once what is recorded then, for kernels to be compiled: no gradient and no random number comes of it."""
        state = torch.cuda.get_rng_state(self.stream.device)
        self._run_aside(least_special(batch), torch.zeros((), device=self.stream.device))
        torch.cuda.set_rng_state(state, self.stream.device)


def least_special(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`batch` with two texts in each row: of one, no mask is made, which a recording cannot leave out."""
    positions = torch.arange(batch["position_ids"].shape[1], device=batch["position_ids"].device)
    half = -(-len(positions) // 2)
    return {**batch, "position_ids": (positions % half).expand_as(batch["position_ids"])}
