"""A captured step does what the step does, bit by bit.

With CUDA's graphs where there is a GPU, otherwise with the stand-in of stand_ins.py.
"""

import pytest
import torch
from harness import GPUS, expect_equal
from stand_ins import let_the_cpu_capture

import quest_12_1 as quest

DEVICE = "cuda" if GPUS else "cpu"
ONLY_STAND_IN = pytest.mark.skipif(GPUS > 0, reason="about the stand-in for graphs")


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Let the CPU record and replay, where there is no GPU."""
    if not GPUS:
        let_the_cpu_capture(monkeypatch)


@pytest.fixture
def count_replays(monkeypatch):
    """A list that grows by one at each replay."""
    replays = []

    class Counted(torch.cuda.CUDAGraph):
        def replay(self):
            replays.append(self)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    return replays


def one_by_one(step):
    """In place of CapturedStep: the step as it is."""
    return step


def noise_state():
    """The state of the generator that training's noise comes from."""
    return torch.cuda.get_rng_state() if GPUS else torch.get_rng_state()


def new_model(rate=1e-3):
    """A VAE and its Adam, the same at each call."""
    torch.manual_seed(1)
    model = quest.VAE().to(DEVICE)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=rate, fused=True, capturable=True
    )
    return model, optimizer


def all_of(model, optimizer):
    """Weights, Adam's state and the noise's: tensors by their names."""
    left = {name: weight.clone() for name, weight in model.state_dict().items()}
    for (name, _), state in zip(
        model.named_parameters(), optimizer.state.values(), strict=True
    ):
        left |= {f"Adam's {key} of {name}": state[key].clone() for key in state}
    left["noise"] = noise_state()
    return left


def train(accelerate, x, epochs):
    """Train for an epoch per (beta, rate) of `epochs`, on batches of 128.

    Returns all that is told and left, as tensors by their names.
    """
    model, optimizer = new_model()
    x = x.to(DEVICE, copy=True)
    told = {}
    for number, (beta, rate) in enumerate(epochs, start=1):
        optimizer.param_groups[0]["lr"] = rate

        def step(batch, beta=beta):
            return quest.train_step(model, optimizer, batch, beta)

        loss = quest.train_epoch(accelerate(step), x.split(128))
        told[f"loss of epoch {number}"] = torch.tensor(loss)
    return told | all_of(model, optimizer) | {"images": x}


# Last batches: of 1,000 digits 104, of 640 as many as the others, of 130 two; 128 and
# 50 make a single batch.
@pytest.mark.parametrize("count", [1000, 640, 130, 128, 50])
def test_captured_epochs_are_the_same_steps(digits, count):
    epochs = [(1, 1e-3), (1, 1e-3)]

    captured = train(quest.CapturedStep, digits[:count], epochs)

    expect_equal(captured, train(one_by_one, digits[:count], epochs))


def test_beta_and_rate_may_change_between_epochs(digits):
    epochs = [(1, 1e-3), (30, 1e-3), (0, 3e-3), (1, 0.0)]

    captured = train(quest.CapturedStep, digits[:1000], epochs)

    expect_equal(captured, train(one_by_one, digits[:1000], epochs))


def test_learn_is_the_same_captured_and_twice_in_one_process(digits):
    x = digits[:600].to(DEVICE)
    x_test = digits[600:700].to(DEVICE)
    settings = quest.Settings(epochs=3)

    def learned(accelerate):
        model, dreams, losses = quest.learn(x, x_test, settings, accelerate)
        told = {
            f"{name} of epoch {number}": torch.tensor(value)
            for number, loss in enumerate(losses, start=1)
            for name, value in loss.items()
        }
        pictures = {f"dreams {n}": images for n, images in enumerate(dreams)}
        return told | pictures | model.state_dict() | {"noise": noise_state()}

    first = learned(quest.CapturedStep)

    expect_equal(learned(quest.CapturedStep), first)
    expect_equal(learned(one_by_one), first)


def test_a_rate_on_the_device_may_fall_within_an_epoch(digits):
    x = digits[:1280].to(DEVICE)

    def falling(accelerate):
        model, optimizer = new_model(rate=torch.tensor(1e-3, device=DEVICE))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.8**n)
        step = accelerate(lambda batch: quest.train_step(model, optimizer, batch))
        for batch in x.split(128):
            step(batch)
            schedule.step()
        return all_of(model, optimizer)

    expect_equal(falling(quest.CapturedStep), falling(one_by_one))


def test_losses_of_steps_can_be_kept_in_a_list(digits):
    x = digits[:768].to(DEVICE)

    def losses(accelerate):
        model, optimizer = new_model()
        step = accelerate(lambda batch: quest.train_step(model, optimizer, batch))
        return torch.stack([step(batch) for batch in x.split(128)])

    captured = losses(quest.CapturedStep)

    expect_equal({"losses": captured}, {"losses": losses(one_by_one)})


def test_noise_is_new_at_each_step(digits):
    x = digits[:128].to(DEVICE)
    model, optimizer = new_model(rate=0.0)
    step = quest.CapturedStep(lambda batch: quest.train_step(model, optimizer, batch))

    losses = [step(x).item() for _ in range(10)]

    assert len(set(losses)) == 10, f"losses that repeat: {losses}"


def test_most_steps_are_replayed(digits, count_replays):
    train(quest.CapturedStep, digits[:1280], [(1, 1e-3)] * 2)

    assert len(count_replays) > 10, f"of 20 steps {len(count_replays)} were replayed"


def functions_in(error):
    """The names of the functions in an error's traceback, as Python prints it."""
    names = []
    while error is not None:
        place = error.__traceback__
        while place is not None:
            names.append(place.tb_frame.f_code.co_name)
            place = place.tb_next
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden
    return names


@ONLY_STAND_IN  # on a GPU the process cannot go on: test_cuda.py has a process for it
def test_a_step_that_waits_for_the_gpu_is_refused_with_its_line(digits):
    model, optimizer = new_model()

    def reading_step(batch):
        loss = quest.train_step(model, optimizer, batch)
        assert loss.item() > 0
        return loss

    step = quest.CapturedStep(reading_step)
    with pytest.raises(RuntimeError, match="cannot be recorded") as caught:
        quest.train_epoch(step, digits[:512].to(DEVICE).split(128))

    assert "reading_step" in functions_in(caught.value)


def test_a_bug_in_a_step_is_told_as_itself(digits):
    model, optimizer = new_model()
    calls = []

    def faulty_step(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyError("a bug")
        return quest.train_step(model, optimizer, batch)

    step = quest.CapturedStep(faulty_step)
    with pytest.raises(KeyError, match="a bug"):
        quest.train_epoch(step, digits[:512].to(DEVICE).split(128))


@ONLY_STAND_IN
def test_each_device_records_on_one_stream_of_its_own(count_replays):
    """PyTorch keeps memory for each stream. "meta" is a second device that every
    PyTorch has; it computes nothing."""
    devices = ["cpu", "meta", "cpu"]
    streams = []
    for device in devices:
        step = quest.CapturedStep(lambda batch: batch.sum())
        for _ in range(3):
            step(torch.ones(4, device=device))
        streams.append(count_replays[-1].stream)

    assert [stream.device.type for stream in streams] == devices
    assert streams[2] is streams[0], "a second stream on a device that has one"


@ONLY_STAND_IN
def test_the_stand_in_refuses_what_cuda_refuses(digits):
    model = quest.VAE()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    step = quest.CapturedStep(lambda batch: quest.train_step(model, optimizer, batch))

    with pytest.raises(RuntimeError, match="capturable is False"):
        quest.train_epoch(step, digits[:512].split(128))
