"""The whole job on a second device, "far", in place of a GPU.

The CPU computes for it, so the results must be the CPU's, bit by bit. stand_ins.py says
what it can show and what not.
"""

from collections import Counter

import pytest
import torch
from harness import (
    GPUS,
    SMALL,
    expect_equal,
    expect_success,
    run_job,
    run_script,
)
from stand_ins import CROSSINGS, use_far_device

pytestmark = pytest.mark.skipif(
    GPUS > 0, reason="a process that uses PrivateUse1 cannot train on a CUDA GPU"
)


def run_far(folder, *arguments):
    """Run the script on "far"; return how often which function crossed."""
    (folder / CROSSINGS).unlink(missing_ok=True)
    result = run_script(folder, *arguments, device="far:0", fault=use_far_device)
    expect_success(result)
    return Counter((folder / CROSSINGS).read_text().splitlines())


def saved_tensors(path):
    """All that a model's file holds, as tensors by their names."""
    saved = torch.load(path)
    for name, weight in saved["model"].items():
        assert weight.device.type == "cpu", f"{name} was saved on {weight.device}"
    dreams = {f"dreams {n}": images for n, images in enumerate(saved["dreams"])}
    losses = {
        f"{name} of epoch {number}": torch.tensor(value)
        for number, loss in enumerate(saved["losses"], start=1)
        for name, value in loss.items()
    }
    return saved["model"] | dreams | losses


def test_a_second_device_gives_the_same_files(folder, small_run):
    run_far(folder, *SMALL)

    far = folder / "dreams"
    near = small_run.output
    expect_equal(
        saved_tensors(far / "dream_model.pt"), saved_tensors(near / "dream_model.pt")
    )
    pictures = [place / "dream_sample.png" for place in (far, near)]
    same = pictures[0].read_bytes() == pictures[1].read_bytes()
    assert same, "the pictures differ"


def test_training_waits_for_the_device_per_epoch_and_not_per_step(folder):
    """2,000 digits are 2 steps per epoch with batches of 1,000, 10 with 200."""
    few_steps = run_far(folder, "--epochs", "1", "--batch-size", "1000")
    many_steps = run_far(folder, "--epochs", "1", "--batch-size", "200")

    assert many_steps == few_steps, (
        f"crossings with more steps alone: {many_steps - few_steps}, "
        f"with fewer alone: {few_steps - many_steps}"
    )


def mix_devices():
    use_far_device()
    torch.zeros(2, device="far:0") + torch.zeros(2)


def test_the_stand_in_refuses_tensors_of_two_devices(folder):
    result = run_job(folder, mix_devices)

    assert result.returncode == 1
    assert "tensors on two devices" in result.stderr


def step_with_a_rate_on_the_device():
    use_far_device()
    weights = torch.nn.Linear(3, 2).to("far:0")
    rate = torch.tensor(0.1, device="far:0")
    optimizer = torch.optim.Adam(
        weights.parameters(), lr=rate, fused=True, capturable=True
    )
    weights(torch.ones(1, 3, device="far:0")).sum().backward()
    optimizer.step()
    print(weights.bias.cpu())


def test_the_stand_in_takes_a_rate_on_the_device(folder):
    expect_success(run_job(folder, step_with_a_rate_on_the_device))
