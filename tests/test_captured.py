"""The captured step is the step: with real graphs where there is a GPU, otherwise with a stand-in for them."""

import pytest
import standin
import torch
from harness import GPUS
from torch.utils.data import DataLoader

import quest_12_1 as quest

DEVICE, noise = ("cuda", torch.cuda.get_rng_state) if GPUS else ("cpu", torch.get_rng_state)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    if not GPUS:
        standin.install(monkeypatch)


@pytest.fixture
def one_by_one(monkeypatch):
    """Call a function while each step is taken as it is."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(quest, "CapturedStep", lambda step: step)
            return function(*arguments)

    return call


def trained(x, changes, rate=1e-3, within=lambda optimizer: None):
    """An epoch for each (BETA, learning rate) of the changes; what is told and what is left, as tensors."""
    torch.manual_seed(1)
    model = quest.VAE().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=True)
    loader, losses = DataLoader(x.to(DEVICE), batch_size=128, shuffle=True), []

    def batches():
        for batch in loader:
            yield batch
            within(optimizer)

    for beta, rate in changes:
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate
        losses.append(torch.tensor(quest.train_epoch(model, optimizer, batches(), beta)))
    adam = [tensor for group in optimizer.state.values() for tensor in group.values()]
    return [*losses, *model.parameters(), *adam, noise()]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


# Of 1,000 digits the last batch has 104, of 640 as many as the others, of 130 two; 128 and 50 make a single batch.
@pytest.mark.parametrize("count", [1000, 640, 130, 128, 50])
def test_captured_epochs_are_the_same_steps_bit_for_bit_also_with_beta_and_rate_changed_between_them(
    held_out, one_by_one, count
):
    """Losses, weights, Adam's state and the noise's."""
    x, changes = held_out[0][:count], [(1, 1e-3), (30, 1e-3), (1, 3e-3)]
    captured = trained(x, changes)
    assert same(captured, one_by_one(trained, x, changes)) and len(set(captured[:3])) == 3


def test_learn_learns_the_same_twice_in_one_process_and_as_step_by_step(held_out, one_by_one):
    def learned():
        model, dreams, losses = quest.learn(held_out[0][:600].to(DEVICE), held_out[0][600:700].to(DEVICE), epochs=3)
        return [*map(torch.tensor, (list(loss.values()) for loss in losses)), *model.parameters(), *dreams]

    first = learned()
    assert same(first, learned()) and same(first, one_by_one(learned))


def test_within_an_epoch_a_rate_on_the_gpu_is_followed_and_a_python_number_stays_as_it_was_captured(
    held_out, one_by_one
):
    def halve(optimizer):
        optimizer.param_groups[0]["lr"] *= 0.5  # a tensor in its place

    def falling(rate):
        return trained(held_out[0][:1280], [(1, None)], rate, halve)

    assert same(falling(torch.tensor(1e-3, device=DEVICE)), one_by_one(falling, torch.tensor(1e-3, device=DEVICE)))
    assert not same(falling(1e-3), one_by_one(falling, 1e-3))


def test_each_epoch_captures_its_second_batch_anew_and_replays_all_but_the_first_and_a_smaller_last_one(
    held_out, monkeypatch
):
    replays = []

    class Counted(torch.cuda.CUDAGraph):
        def replay(self):
            replays.append(self)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    for count, expected in (
        (1000, 6),
        (512, 3),
        (200, 0),
    ):  # 7 whole batches and a smaller one; 4 whole ones; one of each
        trained(held_out[0][:count], [(1, 1e-3)] * 2)
        assert len(replays) == 2 * expected and len(set(map(id, replays))) == 2 * bool(expected)
        replays.clear()
