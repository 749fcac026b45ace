"""The captured step is the step: with real graphs where there is a GPU, otherwise with a stand-in for them."""

import contextlib

import pytest
import torch
from harness import GPUS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quest_12_1 as quest

DEVICE, noise = ("cuda", torch.cuda.get_rng_state) if GPUS else ("cpu", torch.get_rng_state)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graph:
    """A stand-in for a CUDA graph on the CPU: what is recorded takes effect when it is replayed, in the same memory."""

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
    before = noise()
    with Recording(graph.tape):
        yield
    torch.set_rng_state(before)  # to record draws nothing


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Without a GPU, let the script take the CPU for one, as far as its training steps are concerned."""
    if not GPUS:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", record)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)


def one_by_one(model, optimizer, batches, beta):
    """What train_epoch does and returns, each step taken as it is."""
    losses, counts = zip(*[(quest.train_step(model, optimizer, x, beta), len(x)) for x in batches])
    return sum(losses).item() / sum(counts)


def trained(x, changes, rate=1e-3, within=lambda optimizer: None, epoch=None):
    """An epoch for each (BETA, learning rate) of the changes; what is told and what is left, as tensors."""
    torch.manual_seed(1)
    model, x = quest.VAE().to(DEVICE), x.to(DEVICE, copy=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=True)

    def batches():
        for batch in x.split(128):
            yield batch
            within(optimizer)

    losses = []
    for beta, rate in changes:
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        losses.append(torch.tensor((epoch or quest.train_epoch)(model, optimizer, batches(), beta)))
    adam = [tensor for group in optimizer.state.values() for tensor in group.values()]
    return [*losses, *model.parameters(), *adam, noise(), x]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


# Of 1,000 digits the last batch has 104, of 640 as many as the others, of 130 two; 128 and 50 make a single batch.
@pytest.mark.parametrize("count", [1000, 640, 130, 128, 50])
def test_captured_epochs_are_the_same_steps_bit_for_bit_also_with_beta_and_rate_changed_between_them(held_out, count):
    """Losses, weights, Adam's state, the noise's, and the images."""
    x, changes = held_out[0][:count], [(1, 1e-3), (30, 1e-3), (1, 3e-3)]
    captured = trained(x, changes)
    assert same(captured, trained(x, changes, epoch=one_by_one)) and len(set(captured[:3])) == 3


def test_learn_learns_the_same_twice_in_one_process_and_as_step_by_step(held_out, monkeypatch):
    def learned():
        model, dreams, losses = quest.learn(held_out[0][:600].to(DEVICE), held_out[0][600:700].to(DEVICE), epochs=3)
        return [*map(torch.tensor, (list(loss.values()) for loss in losses)), *model.parameters(), *dreams, noise()]

    first, second = learned(), learned()
    monkeypatch.setattr(quest, "CapturedStep", lambda step: step)
    assert same(first, second) and same(first, learned())


def test_within_an_epoch_a_rate_on_the_gpu_is_followed_and_a_python_number_stays_as_it_was_captured(held_out):
    def halve(optimizer):
        optimizer.param_groups[0]["lr"] *= 0.5  # a tensor in its place

    def falling(rate, epoch=None):
        return trained(held_out[0][:1280], [(1, None)], rate, halve, epoch)

    rates = [torch.tensor(1e-3, device=DEVICE) for _ in range(2)]
    assert same(falling(rates[0]), falling(rates[1], one_by_one))
    assert not same(falling(1e-3), falling(1e-3, one_by_one))


def test_each_epoch_captures_its_second_batch_anew_and_replays_all_but_the_first_and_a_smaller_last_one(
    held_out, monkeypatch
):
    replays = []

    class Counted(torch.cuda.CUDAGraph):
        def replay(self):
            replays.append(self)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    for count, expected in ((1000, 6), (512, 3), (200, 0)):  # 7 whole batches and a smaller one; 4 whole; one of each
        trained(held_out[0][:count], [(1, 1e-3)] * 2)
        assert len(replays) == 2 * expected and len(set(map(id, replays))) == 2 * bool(expected)
        replays.clear()
