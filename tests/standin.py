"""A stand-in for CUDA graphs on the CPU: what is recorded takes effect when `replay` does it, in the same memory."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graph:
    def __init__(self):
        self.tape = []  # operation, its arguments, whether it works in place, the memory of its result

    @torch.no_grad()
    def replay(self):
        for operation, arguments, named, in_place, recorded in self.tape:
            result = operation(*arguments, **named)
            for memory, new in () if in_place else zip(tensors(recorded), tensors(result)):
                memory.copy_(new)


class Recording(TorchDispatchMode):
    """Notes down each operation that would launch a kernel, and takes back what it did."""

    def __init__(self, tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        if torch.Tag.data_dependent_output in operation.tags:  # .item()
            raise RuntimeError("operation not permitted when stream is capturing")
        schema, named = operation._schema, named or {}
        view = any(part.alias_info is not None and not part.alias_info.is_write for part in schema.returns)
        if view or "_record_function" in str(operation):
            return operation(*arguments, **named)
        in_place = tensors([a for a, s in zip(arguments, schema.arguments) if s.alias_info and s.alias_info.is_write])
        before = [tensor.clone() for tensor in in_place]
        result = operation(*arguments, **named)
        for memory, value in zip(in_place, before):
            memory.copy_(value)
        for memory in () if in_place else tensors(result):
            memory.fill_(0.5)  # as undefined as a GPU's memory before the first replay, but valid pixels
        self.tape.append((operation, arguments, named, bool(in_place), result))
        return result


@contextlib.contextmanager
def record(graph, **_):
    noise = torch.get_rng_state()
    with Recording(graph.tape):
        yield
    torch.set_rng_state(noise)  # to record draws nothing


def install(monkeypatch):
    """Let the script take the CPU for a GPU, as far as its training steps are concerned."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
