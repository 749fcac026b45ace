"""On a GPU: the job as a user starts it, and the promises that only a GPU can keep or break."""

import subprocess
import sys

import pytest
import torch
from harness import GPUS, ROOT, run
from torch.utils.data import DataLoader

import quest_12_1 as quest

pytestmark = pytest.mark.skipif(GPUS == 0, reason="no CUDA device here")


def test_the_main_job_without_any_argument_trains_on_the_gpu(folder):
    result = run(folder)
    assert result.returncode == 0 and (folder / "dreams" / "dream_sample.png").is_file(), result.stderr
    assert f"s on {torch.cuda.get_device_name()}. " in result.stdout
    assert 151.5 < float(result.stdout.split("Held-out loss: ")[1].split()[0]) < 157


def test_the_same_seed_dreams_the_same_bytes_on_the_gpu(folder):
    def pictures(seed):
        assert run(folder, "--epochs", "2", "--seed", seed, "--gallery").returncode == 0
        return [path.read_bytes() for path in sorted((folder / "dreams").glob("dream_*.png"))]

    assert pictures("7") == pictures("7") != pictures("8")


def test_from_the_same_weights_batches_and_noise_five_steps_on_the_gpu_reach_the_cpu_s_weights(held_out, monkeypatch):
    """Five, since the first step of Adam is only a sign. The noise is drawn on the CPU for both."""
    monkeypatch.setattr(torch, "randn_like", lambda std: torch.randn(std.shape, device="cpu").to(std.device))
    x, x_test = held_out[0][:640], held_out[0][640:]
    cpu, gpu = (quest.learn(x.to(device), x_test.to(device), 1) for device in ("cpu", "cuda"))
    for name, weight in cpu[0].state_dict().items():
        apart = (gpu[0].state_dict()[name].cpu() - weight).abs()
        assert (apart > 1e-4).float().mean() < 0.01, name  # a gradient of about 0 may differ in sign
    assert gpu[2][0] == pytest.approx(cpu[2][0], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_of_an_epoch_waits_for_the_gpu(model, held_out):
    model = model.to("cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=quest.LEARNING_RATE, fused=True)
    loader = DataLoader(held_out[0][:2000].to("cuda"), batch_size=128, shuffle=True)
    quest.train_epoch(model, optimizer, loader)  # sets up

    def watched():
        """The loader's batches; any wait is an error from the first on to the end of the last."""
        batches = iter(loader)
        yield next(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches
            with pytest.raises(RuntimeError, match="synchroniz"):
                model.fc1.bias[0].item()  # this waits: the check can fail
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert 100 < quest.train_epoch(model, optimizer, watched()) < 600


@pytest.mark.skipif(GPUS < 2, reason="only one CUDA device here")
def test_training_on_the_second_gpu_leaves_the_first_alone(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = "import sys, torch, quest_12_1 as q; sys.exit(q.main(sys.argv[1:]) or torch._C._cuda_hasPrimaryContext(0))"
    subprocess.run([sys.executable, "-c", job, "--device", "cuda:1", "--epochs", "1"], cwd=folder, check=True)
