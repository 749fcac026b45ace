"""What only a GPU can show; skipped where there is none.

The job as a user starts it, and the promises that only a GPU can keep or break.
"""

import json
import math
import re
from functools import partial

import faults
import pytest
import torch
from harness import (
    GPUS,
    ROOT,
    expect_equal,
    expect_one_message,
    expect_success,
    make_clone,
    run_gallery,
    run_script,
)
from torch.utils.data import DataLoader

import quest_12_1 as quest

pytestmark = pytest.mark.skipif(GPUS == 0, reason="no CUDA device here")


@pytest.fixture
def clone(tmp_path):
    """A clone with all digits."""
    return make_clone(tmp_path, ROOT / "data")


def run_on_gpu(clone, *arguments, fault=None):
    """Run the script as a user with a GPU does, without --device."""
    return run_script(clone, *arguments, device=None, fault=fault, threads=None)


# ---- The job -------------------------------------------------------------------------
def test_the_main_job_without_any_argument_dreams_the_same_bytes_twice(clone):
    saved = []
    for _ in range(2):
        result = run_on_gpu(clone)
        expect_success(result)
        assert "s on cuda. " in result.stdout
        picture = (clone / "dreams" / "dream_sample.png").read_bytes()
        saved.append((picture, torch.load(clone / "dreams" / "dream_model.pt")))

    (picture, first), (again, second) = saved
    same = picture == again
    assert same, "the second run dreamt other bytes"
    expect_equal(first["model"], second["model"])
    assert first["losses"] == second["losses"]
    # Seeds 0 to 4 ended at 153.88 to 155.84 on an H100.
    assert first["losses"][-1]["held_out"] < 158


def test_another_seed_dreams_other_digits(clone):
    dreams = []
    for seed in ("0", "1"):
        expect_success(run_on_gpu(clone, "--epochs", "1", "--seed", seed))
        dreams.append(torch.load(clone / "dreams" / "dream_model.pt")["dreams"][-1])

    differ = dreams[0] != dreams[1]
    assert differ.any(), "two seeds dreamt the same"


def test_what_is_saved_opens_without_a_gpu(clone):
    expect_success(run_on_gpu(clone, "--epochs", "1"))

    saved = torch.load(clone / "dreams" / "dream_model.pt")

    assert all(weight.is_cpu for weight in saved["model"].values())
    assert all(images.is_cpu for images in saved["dreams"])
    expect_success(run_gallery(clone))


# ---- The steps -----------------------------------------------------------------------
def test_five_steps_on_the_gpu_reach_the_cpu_s_weights(digits, monkeypatch):
    """Five, since the first step of Adam is only a sign. The noise is a function of its
    place in the tensor, so that both draw the same, and that it can be recorded."""

    def noise(std):
        place = torch.arange(std.numel(), device=std.device)
        return 1.4 * torch.sin(0.7 * place).view_as(std)

    monkeypatch.setattr(torch, "randn_like", noise)
    x, x_test = digits[:640], digits[640:2000]
    settings = quest.Settings(epochs=1)

    cpu, _, (on_cpu,) = quest.learn(x, x_test, settings)
    gpu, _, (on_gpu,) = quest.learn(
        x.cuda(), x_test.cuda(), settings, quest.CapturedStep
    )

    for name, weight in cpu.state_dict().items():
        apart = (gpu.state_dict()[name].cpu() - weight).abs()
        far = (apart > 1e-4).float().mean().item()
        # Where a gradient is about 0, its sign may differ by rounding.
        assert far < 0.01, f"{name}: {100 * far:.1f} % of the weights are elsewhere"
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_once_captured_no_step_of_an_epoch_waits_for_the_gpu(digits):
    """Any wait is an error from the third batch on; the capture itself waits."""
    model = quest.VAE().cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=True, capturable=True)
    step = quest.CapturedStep(partial(quest.train_step, model, optimizer))
    loader = DataLoader(digits[:2000].cuda(), batch_size=128, shuffle=True)

    def watched():
        batches = iter(loader)
        yield next(batches)
        yield next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches
            with pytest.raises(RuntimeError, match="synchroniz"):
                torch.ones(1, device="cuda").item()  # this waits: the check can fail
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert math.isfinite(quest.train_epoch(step, watched()))


def test_a_third_learn_leaves_no_more_memory_in_use_than_the_second(digits):
    x = digits[:2000].cuda()
    in_use = []
    for _ in range(3):
        quest.learn(x, x[:100], quest.Settings(epochs=2), quest.CapturedStep)
        in_use.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    assert in_use[2] == in_use[1], f"allocated and reserved after each: {in_use}"


@pytest.mark.skipif(GPUS < 2, reason="there is one GPU")
def test_two_gpus_in_one_process_learn_the_same(digits):
    settings = quest.Settings(epochs=2)

    def learned(device):
        x = digits[:1280].to(device)
        model = quest.learn(x, x[:100], settings, quest.CapturedStep)[0]
        return {name: weight.cpu() for name, weight in model.state_dict().items()}

    first = learned("cuda:0")

    expect_equal(learned("cuda:1"), first)
    expect_equal(learned("cuda:0"), first)


# ---- What goes wrong -----------------------------------------------------------------
def test_a_full_gpu_is_one_message(clone):
    result = run_on_gpu(clone, "--epochs", "1", fault=faults.little_gpu_memory)

    expect_one_message(result, "CUDA out of memory")
    assert not (clone / "dreams" / "dream_sample.png").exists()


@pytest.mark.parametrize("rate", ["10", "1e3", "1e20"])
def test_a_rate_that_is_too_high_is_one_message(clone, rate):
    """Left to PyTorch's own check, NaN stops the GPU and, in a replay, the process."""
    result = run_on_gpu(clone, "--epochs", "2", "--json", "--learning-rate", rate)

    message = expect_one_message(result, "lower the learning rate")
    assert json.loads(result.stdout) == {"success": False, "message": message}
    assert not re.search("Assertion|Traceback", result.stderr)
    assert not (clone / "dreams" / "dream_sample.png").exists()


def test_a_step_that_waits_for_the_gpu_is_refused_with_its_line(clone):
    result = run_on_gpu(clone, "--epochs", "1", fault=faults.step_that_waits)

    assert result.returncode == 1
    assert "this step cannot be recorded" in result.stderr
    assert "in reading_step" in result.stderr, "the traceback lacks the step's line"


def test_a_device_that_is_not_there_is_one_message(clone):
    result = run_script(clone, device=f"cuda:{GPUS}")

    expect_one_message(result, f"device 'cuda:{GPUS}'", "invalid device ordinal")
