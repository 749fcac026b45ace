"""On a GPU: the job as a user starts it, and the promises that only a GPU can keep or break."""

import subprocess
import sys

import pytest
import torch
from harness import GPUS, NO_BAR, ROOT, adam_of, run

import quest_12_1 as quest

pytestmark = pytest.mark.skipif(GPUS == 0, reason="no CUDA device here")


def test_the_main_job_without_any_argument_trains_on_the_gpu(folder):
    result = run(folder)
    assert result.returncode == 0 and (folder / "dreams" / "dream_sample.png").is_file(), result.stderr
    assert f"s on {torch.cuda.get_device_name()}. " in result.stdout
    assert 140 < float(result.stdout.split("Held-out loss: ")[1].split()[0]) <= 156.5


def test_the_same_seed_dreams_the_same_bytes_on_the_gpu(folder):
    def pictures(seed):
        assert run(folder, "--epochs", "2", "--seed", seed, "--gallery").returncode == 0
        return [path.read_bytes() for path in sorted((folder / "dreams").glob("dream_*"))]

    assert pictures("7") == pictures("7") != pictures("8")


def test_from_the_same_weights_batch_and_noise_a_step_on_the_gpu_reaches_the_cpu_s_weights(held_out, monkeypatch):
    eps, weights = torch.randn(128, 2), []
    monkeypatch.setattr(torch, "randn_like", lambda std: eps.to(std.device))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = quest.VAE().to(device)
        quest.train_epoch(model, adam_of(model), [held_out[0][:128].to(device)], NO_BAR)
        weights.append(model.fc1.weight.detach().cpu())
    # Adam's first step is lr * sign(gradient): a gradient of about 0 may differ in sign, and then by 2 lr
    assert ((weights[0] - weights[1]).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_of_an_epoch_waits_for_the_gpu(model, held_out):
    loader, model = quest.ShuffledBatches(held_out[0][:2000].to("cuda"), 128), model.to("cuda")
    optimizer = adam_of(model)
    quest.train_epoch(model, optimizer, loader, NO_BAR)  # sets up

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

    assert quest.train_epoch(model, optimizer, watched(), NO_BAR) > 100


@pytest.mark.skipif(GPUS < 2, reason="only one CUDA device here")
def test_training_on_the_second_gpu_leaves_the_first_alone(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = "import sys, torch, quest_12_1; code = quest_12_1.main(['--device', 'cuda:1', '--epochs', '1']); "
    check = "sys.exit(code or torch._C._cuda_hasPrimaryContext(0))"
    subprocess.run([sys.executable, "-c", job + check], cwd=folder, check=True)
