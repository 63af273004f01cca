"""Steps of a training on a GPU: recorded once as a CUDA graph, then replayed with one launch.

A small student's step is hundreds of kernels, each shorter than the time that Python takes to launch it. A
CUDA graph launches all of them at once. It reads and writes the same memory each time, so inputs are copied
into buffers that stay, weights are changed in place, and all else that a step touches is kept (`Resident`).

The first steps of each batch size run as they are: they make the optimizer's state and warm the libraries
up, and they are steps of the training like all others. Nothing here is used on a CPU, but for `Step`, which
runs there without a recording in the tests.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

#: Steps of each batch size before the recording.
EAGER_STEPS = 3

#: Recordings that a model keeps, in one pool of memory: two batch sizes a client, and clients differ in size.
MAX_RECORDINGS = 64

#: A step of fixed sizes: tensors in, a tensor out.
Function = Callable[..., Tensor]

#: A function and its inputs' memory to what takes the step there without an argument.
Record = Callable[[Function, list[Tensor]], Callable[[], Tensor]]

_recording = threading.Lock()


class Step:
    """A function of tensors of one size: run as it is at first, then recorded and replayed.

    Attributes:
        function: called with `buffers`; what it returns is overwritten by the next call.
        buffers: copies of the inputs, always in the same memory.
    """

    def __init__(
        self, function: Function, inputs: tuple[Tensor, ...], record: Callable[..., Function]
    ) -> None:
        self.function, self.record = function, record
        self.buffers = [torch.empty_like(value) for value in inputs]
        self.eager_steps = EAGER_STEPS
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Copy the inputs into the buffers, and take the step."""
        for buffer, value in zip(self.buffers, inputs, strict=True):
            buffer.copy_(value)
        if self.eager_steps:
            self.eager_steps -= 1
            return self.function(*self.buffers)
        if self.replay is None:
            self.replay = self.record(self.function, self.buffers)
        return self.replay()


class Resident:
    """Memory that stays beside a model between its trainings, because its recordings hold it.

    Attributes:
        stream: of all the model's steps; recording needs one that is not the default.
        steps: the function's parts and the batch's shapes to a step; the latest used come last.
        kept: all else: the optimizer, the weights of a proximal term.
        recordable: False once a step could not be recorded; the steps after it are not tried.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.steps: dict[tuple, Step] = {}
        self.kept: dict[Any, Any] = {}
        self.recordable = True

    def step(self, parts: tuple, function: Function, *inputs: Tensor) -> Tensor:
        """Take a step by the recording of the same function, or begin one.

        Args:
            parts: the objects that the function is made of. The function has to hold them, so that none of
                them is replaced by another at the same address.
            function: takes the inputs.
        """
        key = (*map(id, parts), *(value.shape for value in inputs))
        step = self.steps.pop(key, None) or Step(function, inputs, _recorder(self))
        self.steps[key] = step
        if len(self.steps) > MAX_RECORDINGS:
            del self.steps[next(iter(self.steps))]
        return step(*inputs)

    @contextlib.contextmanager
    def own_stream(self) -> Iterator[None]:
        """Run what follows on the model's stream, after the work that is under way, and before later work."""
        if self.stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:  # also after Ctrl-C: steps that are under way would change weights that are loaded next
            outside.wait_stream(self.stream)


def _recorder(resident: Resident) -> Callable[..., Callable[[], Tensor]]:
    """Return `record` for a model's steps; it does not keep the model's memory alive."""
    held = ref(resident)
    return lambda function, buffers: record(function, buffers, resident=held())


def record(function: Function, buffers: list[Tensor], resident: Resident) -> Callable[[], Tensor]:
    """Record a function of buffers as a CUDA graph, and return what replays it.

    Where it cannot be recorded, for example because it waits for the device, a warning says so and the
    function is called as it is. So are the model's later functions: none of them is tried.
    """
    if not resident.recordable:
        return partial(function, *buffers)
    outside = torch.cuda.current_stream(resident.stream.device) if resident.stream else None
    try:
        graph = torch.cuda.CUDAGraph()
        # One at a time: other threads may train on other devices meanwhile, and allocate memory there.
        with (
            _recording,
            torch.cuda.graph(
                graph, pool=resident.pool, stream=resident.stream, capture_error_mode="thread_local"
            ),
        ):
            result = function(*buffers)
    except Exception as error:  # what a model's kernels raise is not known beforehand
        resident.recordable = False
        if outside is not None:
            _end_broken(resident, outside)
        reason = _first_cause(error)
        warnings.warn(
            f"a training step cannot be recorded as a CUDA graph, so its kernels are launched one by one, "
            f"which is slower ({reason})",
            stacklevel=2,
        )
        return partial(function, *buffers)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _end_broken(resident: Resident, outside: torch.cuda.Stream) -> None:
    """Leave the stream and the memory pool of a recording that has failed.

    PyTorch before 2.13 stays in both. Memory that is free would then not be given back in this process, not
    even where another tensor finds none.
    """
    torch.cuda.set_stream(outside)
    with contextlib.suppress(RuntimeError):  # a later PyTorch has left the pool, and says so
        torch._C._cuda_endAllocateToPool(outside.device_index, resident.pool)


def _first_cause(error: BaseException) -> str:
    """Return the first line of the error that came first: the end of a broken recording raises another."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_residents: WeakKeyDictionary[nn.Module, Resident] = WeakKeyDictionary()


def resident(model: nn.Module, device: torch.device) -> Resident:
    """Return what stays beside a model for as long as the model itself does."""
    if model not in _residents:
        _residents[model] = Resident(device)
    return _residents[model]


def release(model: nn.Module) -> None:
    """Give back what stays beside a model, once it is trained: its recordings hold a step's whole memory."""
    if _residents.pop(model, None) is not None:
        model.zero_grad(set_to_none=True)  # gradients lie in the recordings' memory


def usable(device: torch.device) -> bool:
    """Tell if steps can be recorded on a device."""
    return device.type == "cuda"
