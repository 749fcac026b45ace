"""On a GPU: the job as a user starts it, and the promises that only a GPU can keep or break."""

import re
import subprocess
import sys

import pytest
import torch
from harness import GPUS, ROOT, run
from torch.utils.data import DataLoader

import quest_12_1 as quest

pytestmark = pytest.mark.skipif(GPUS == 0, reason="no CUDA device here")


def test_the_main_job_without_any_argument_trains_on_the_gpu_and_with_the_gallery_dreams_the_same_bytes(
    folder,
):
    pictures, gallery = [], ["--gallery"]
    for arguments in ([], gallery, gallery, [*gallery, "--seed", "1"]):
        result = run(folder, *arguments)
        assert (
            result.returncode == 0
            and f"s on {torch.cuda.get_device_name()}. " in result.stdout
        ), result.stderr
        assert 151.5 < float(result.stdout.split("Held-out loss: ")[1].split()[0]) < 157
        pictures.append(
            {
                path.name: path.read_bytes()
                for path in (folder / "dreams").glob("dream_*.png")
            }
        )
    assert (
        pictures[0].items()
        <= pictures[1].items()
        == pictures[2].items()
        != pictures[3].items()
    )


def test_from_the_same_weights_batches_and_noise_five_steps_on_the_gpu_reach_the_cpu_s_weights(
    held_out, monkeypatch
):
    """Five, since the first step of Adam is only a sign. The noise is a function of its place, so that both draw it."""

    def noise(std):
        return 1.4 * torch.sin(
            0.7 * torch.arange(std.numel(), device=std.device)
        ).view_as(std)

    monkeypatch.setattr(torch, "randn_like", noise)
    x, x_test = held_out[0][:640], held_out[0][640:]
    cpu, gpu = (
        quest.learn(x.to(device), x_test.to(device), 1) for device in ("cpu", "cuda")
    )
    for name, weight in cpu[0].state_dict().items():
        apart = (gpu[0].state_dict()[name].cpu() - weight).abs()
        assert (apart > 1e-4).float().mean() < 0.01, (
            name
        )  # a gradient of about 0 may differ in sign
    assert gpu[2][0] == pytest.approx(cpu[2][0], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_once_captured_no_step_of_an_epoch_waits_for_the_gpu(model, held_out):
    optimizer = torch.optim.Adam(
        model.to("cuda").parameters(), fused=True, capturable=True
    )

    def watched():
        """A loader's batches; any wait is an error from the third on, before which the capture itself waits."""
        batches = iter(
            DataLoader(held_out[0][:2000].to("cuda"), batch_size=128, shuffle=True)
        )
        yield next(batches)
        yield next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches
            with pytest.raises(RuntimeError, match="synchroniz"):
                model.fc1.bias[0].item()  # this waits: the check can fail
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert 100 < quest.train_epoch(model, optimizer, watched()) < 600


def test_a_second_learn_leaves_no_more_memory_in_use_than_the_first(held_out):
    x, in_use = held_out[0][:2000].to("cuda"), []
    for _ in range(3):
        quest.learn(x, x[:100], epochs=2)
        in_use.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert in_use[1] == in_use[2]


FULL, NAN = "CUDA out of memory.*", "loss nan, held-out nan: lower LEARNING_RATE"


@pytest.mark.parametrize("said", [FULL, NAN])
def test_a_full_gpu_and_a_real_nan_are_one_message(folder, said):
    change = (
        "q.LEARNING_RATE = 1e3"
        if said == NAN
        else "torch.cuda.set_per_process_memory_fraction(0.003)"
    )
    job = f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); import quest_12_1 as q; {change}; sys.exit(q.main())"
    result = subprocess.run(
        [sys.executable, "-c", job, "--epochs", "1"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and re.fullmatch(
        f"quest_12_1.py: {said}", result.stderr.splitlines()[-1]
    )
    assert not re.search("Assertion|Traceback", result.stderr) and not list(
        (folder / "dreams").glob("dream_*")
    )
