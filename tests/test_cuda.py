"""On a GPU: the job as a user starts it, and the promises that only a GPU can keep or break."""

import subprocess
import sys

import pytest
import torch
from harness import GPUS, ROOT, adam_of, loader_of, run

import quest_12_1 as quest

pytestmark = pytest.mark.skipif(GPUS == 0, reason="no CUDA device here")


def test_the_main_job_without_any_argument_trains_on_the_gpu(folder):
    result = run(folder)
    assert result.returncode == 0 and f"s on {torch.cuda.get_device_name()}, " in result.stdout, result.stderr
    assert 140 < float(result.stdout.split("held-out loss ")[1].split()[0]) <= 156.5
    assert (folder / "dreams" / "dream_sample.png").is_file()


def test_the_same_seed_dreams_the_same_bytes_on_the_gpu(folder):
    def pictures(seed):
        assert run(folder, "--epochs", "2", "--seed", seed, "--gallery").returncode == 0
        return [(folder / "dreams" / name).read_bytes() for name in ("dream_sample.png", *quest.GALLERY)]

    assert pictures("7") == pictures("7") != pictures("8")


def test_the_gpu_follows_the_cpu_s_loss_by_epoch(digits):
    """From the same first weights and batches. The noise differs: 8 noise seeds on the CPU spread by up to 3.2 nats."""
    averages = {"cpu": [], "cuda": []}
    for device, losses in averages.items():
        torch.manual_seed(0)
        loader, model = loader_of(digits.to(device)), quest.VAE().to(device)
        optimizer = adam_of(model)
        for epoch in range(3):
            torch.manual_seed(epoch)
            losses.append(quest.train_epoch(model, optimizer, loader, device))
    assert averages["cuda"] == pytest.approx(averages["cpu"], abs=5.5)


def test_from_the_same_weights_batch_and_noise_a_step_on_the_gpu_reaches_the_cpu_s_weights(digits, monkeypatch):
    eps, weights = torch.randn(128, 2), []
    monkeypatch.setattr(torch, "randn_like", lambda std: eps.to(std.device))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = quest.VAE().to(device)
        quest.train_epoch(model, adam_of(model), [digits[:128].to(device)], device)
        weights.append(model.fc1.weight.detach().cpu())
    # Adam's first step is lr * sign(gradient): a gradient of about 0 may differ in sign, and then by 2 lr
    assert ((weights[0] - weights[1]).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_of_an_epoch_waits_for_the_gpu(digits):
    loader, model = loader_of(digits[:2000].to("cuda")), quest.VAE().to("cuda")
    optimizer = adam_of(model)
    quest.train_epoch(model, optimizer, loader, "sets up")

    class Watched(list):
        """Stands for the loader; any wait is an error from its first batch on to the end of its last."""

        def __iter__(self):
            batches = iter(loader)
            yield next(batches)
            torch.cuda.set_sync_debug_mode("error")
            yield from batches
            with pytest.raises(RuntimeError, match="synchroniz"):
                model.fc1.bias[0].item()  # this waits: the check can fail
            torch.cuda.set_sync_debug_mode("default")

    try:
        assert quest.train_epoch(model, optimizer, Watched(), "Epoch") > 100
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(GPUS < 2, reason="only one CUDA device here")
def test_training_on_the_second_gpu_leaves_the_first_alone(folder):
    program = (
        f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); import quest_12_1 as quest; "
        "assert quest.main(['--device', 'cuda:1', '--epochs', '1']) == 0; "
        "sys.exit(torch._C._cuda_hasPrimaryContext(0))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=folder).returncode == 0


@pytest.mark.fills_gpu
def test_a_gpu_without_free_memory_is_one_message(folder):
    """Opt-in, since it takes nearly all memory of the GPU: less is left than a CUDA context and the digits need."""
    torch.cuda.empty_cache()
    hog = []
    while (free := torch.cuda.mem_get_info()[0]) > 64 << 20:
        hog.append(torch.empty(max(32 << 20, free - (600 << 20)), dtype=torch.uint8, device="cuda"))
    result = run(folder)
    del hog
    assert result.returncode == 1 and "out of memory" in result.stderr and "Traceback" not in result.stderr
