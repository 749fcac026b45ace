"""Stand-ins for a GPU, written in Python; the CPU computes for them.

CUDA graphs: `let_the_cpu_capture` replaces what the script uses of torch.cuda. Then
what is recorded takes effect only when it is replayed, in the same memory, as on a GPU.
Errors are raised where CUDA raises them. What they cannot show: whether a GPU accepts
to record an operation, which stream's work is recorded, memory pools, time.

A second device, "far": `use_far_device` makes it known to PyTorch, for the rest of the
process. As on a GPU, its tensors and the CPU's do not mix, and every crossing between
them is noted. What it cannot show: rounding, memory, time.
"""

import contextlib
import traceback
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# ---- CUDA graphs ---------------------------------------------------------------------
def let_the_cpu_capture(monkeypatch):
    """Replace CUDA's graphs and streams by the stand-ins, for one test."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)


class Stream:
    """A stream of `device`; by default of the current one, the CPU."""

    def __init__(self, device="cpu", priority=0):
        self.device = torch.device(device)


class Graph:
    """A list of operations. `replay` does them, in the memory of the recording."""

    def __init__(self):
        self.tape = []
        self.stream = None  # on which it was recorded

    @torch.no_grad()
    def replay(self):
        for operation, arguments, named, in_place, recorded in self.tape:
            result = operation(*arguments, **named)
            if not in_place:
                new = tensors_in(result)
                for memory, value in zip(tensors_in(recorded), new, strict=True):
                    memory.copy_(value)


@contextlib.contextmanager
def capture(graph, pool=None, stream=None, capture_error_mode="global"):
    """Record what is done within, and undo it; draw no noise."""
    graph.stream = stream or Stream()
    recording = Recording(graph)
    noise = torch.get_rng_state()
    hook = register_optimizer_step_pre_hook(refuse_what_cannot_be_captured)
    try:
        with recording:
            yield
    finally:
        hook.remove()
        torch.set_rng_state(noise)
        if recording.failed:  # as CUDA does, after an error that tells the reason
            raise torch.AcceleratorError(
                "CUDA error: operation failed due to a previous error during capture"
            )


def refuse_what_cannot_be_captured(optimizer, arguments, named):
    """PyTorch itself refuses it, if there is a GPU."""
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise RuntimeError(
            "Attempting CUDA graph capture of step() for an instance of Adam "
            "but param_groups' capturable is False"
        )


class Recording(TorchDispatchMode):
    """Notes each operation that would launch a kernel, and takes back what it did."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph
        self.failed = False

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        if torch.Tag.data_dependent_output in operation.tags:  # .item() waits
            self.failed = True
            raise torch.AcceleratorError(
                "CUDA error: operation not permitted when stream is capturing"
            )
        if launches_nothing(operation):
            return operation(*arguments, **named)

        for tensor in tensors_in((arguments, named)):
            assert tensor.device == self.graph.stream.device or tensor.dim() == 0, (
                f"recorded on a stream of {self.graph.stream.device}, "
                f"but the data are on {tensor.device}"
            )
        return self.record(operation, arguments, named)

    def record(self, operation, arguments, named):
        parameters = operation._schema.arguments
        in_place = tensors_in(
            [
                argument
                for argument, parameter in zip(arguments, parameters, strict=False)
                if parameter.alias_info and parameter.alias_info.is_write
            ]
        )
        before = [tensor.clone() for tensor in in_place]
        result = operation(*arguments, **named)

        for memory, value in zip(in_place, before, strict=True):
            memory.copy_(value)
        if not in_place:
            # As undefined as a GPU's memory before the first replay, but valid pixels.
            for memory in tensors_in(result):
                memory.fill_(0.5)
        self.graph.tape.append((operation, arguments, named, bool(in_place), result))
        return result


def launches_nothing(operation):
    """Tell views of memory, and marks for the profiler, from operations on numbers."""
    if "_record_function" in str(operation):
        return True
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in operation._schema.returns
    )


# ---- A second device -----------------------------------------------------------------
CROSSINGS = "crossings.txt"  # a line for each, in the current folder


def use_far_device():
    """Make "far" a device of this process, for all that follows.

    It takes PyTorch's place for a device of one's own, PrivateUse1. A process in which
    that place is taken cannot train on a CUDA GPU.
    """
    from torch.utils.backend_registration import (
        _setup_privateuseone_for_python_backend as register,
    )

    register("far")
    Far().__enter__()
    FarNumbers().__enter__()


class FarTensor(torch.Tensor):
    """A tensor on "far". `near` holds its numbers, as a tensor of the CPU."""

    __torch_dispatch__ = None  # `Far` does its work

    def __new__(cls, near):
        tensor = cls._make_wrapper_subclass(
            cls, near.shape, near.stride(), dtype=near.dtype, device="far:0"
        )
        tensor.near = near
        return tensor

    def numpy(self, *, force):  # an error without force=True, as on a GPU
        return self.cpu().numpy()

    def tolist(self):  # PyTorch's own refuses a tensor that is written in Python
        return self.cpu().tolist()


class Far(TorchDispatchMode):
    """Does each operation where its tensors are, and notes each crossing."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        leaves, structure = tree_flatten((arguments, named or {}))
        tensors = tensors_in(leaves)
        # As on a GPU, a tensor of the CPU may take part if it is one number.
        sides = {
            tensor.device.type for tensor in tensors if tensor.is_far or tensor.dim()
        }
        assert len(sides) < 2, "tensors on two devices"

        near = [getattr(leaf, "near", leaf) for leaf in leaves]
        arguments, named = tree_unflatten(near, structure)
        named_device = named.pop("device", None)
        side = torch.device(named_device or ("far" if "far" in sides else "cpu")).type

        to_python = torch.Tag.data_dependent_output in operation.tags  # .item()
        goal = "cpu" if to_python else side
        if any(tensor.device.type != goal for tensor in tensors):
            note_crossing("reads" if goal == "cpu" else "writes")

        result = operation(*arguments, **named)
        if side == "far":
            return tree_map_only(torch.Tensor, FarTensor, result)
        return result


class FarNumbers(TorchFunctionMode):
    """Lets torch.tensor(..., device="far:0") go through the CPU."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        device = torch.device(named.get("device") or "cpu")
        if function is torch.tensor and device.type == "far":
            return function(*arguments, **named | {"device": "cpu"}).to(device)
        return function(*arguments, **named)


def note_crossing(direction):
    """Note which function of the script reads from "far", or writes to it."""
    functions = [
        call.name
        for call in traceback.extract_stack()
        if Path(call.filename).name == "quest_12_1.py" and not call.name.startswith("<")
    ]
    name = functions[-1] if functions else "a test"
    with open(CROSSINGS, "a") as file:
        file.write(f"{name} {direction}\n")
