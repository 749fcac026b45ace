"""On a GPU: the job as a user starts it, and the promises that only a GPU can keep or break."""

import pytest
import torch
from harness import adam_of, loader_of, only_message, run

import quest_12_1 as quest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

CPU = torch.device("cpu")


@pytest.fixture
def cuda():
    return torch.device("cuda")


def test_the_main_job_without_any_argument_trains_on_the_gpu(folder):
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(f"s on {torch.cuda.get_device_name()}).")
    loss = float(result.stdout.split("held-out loss ")[1].split()[0])
    assert 140 < loss <= 156.5
    assert (folder / "dreams" / "dream_sample.png").is_file()


def test_the_same_seed_dreams_the_same_bytes_on_the_gpu(folder):
    dreams = []
    for seed in ("7", "7", "8"):
        assert run(folder, "--epochs", "2", "--seed", seed).returncode == 0
        dreams.append((folder / "dreams" / "dream_sample.png").read_bytes())
    assert dreams[0] == dreams[1] != dreams[2]


def test_the_gpu_follows_the_cpu_s_loss_by_epoch(digits, cuda):
    """The same first weights and the same batches on both; the noise differs, so averages agree and steps do not."""
    averages = {}
    for device in (CPU, cuda):
        torch.manual_seed(0)
        x = digits.to(device)
        loader = loader_of(x)
        model = quest.VAE().to(device)
        optimizer = adam_of(model)
        averages[device.type] = []
        for epoch in range(3):
            torch.manual_seed(epoch)
            averages[device.type].append(quest.train_epoch(model, optimizer, loader, device.type))
    for on_cpu, on_gpu in zip(averages["cpu"], averages["cuda"], strict=True):
        assert on_gpu.total == pytest.approx(on_cpu.total, abs=2.0)
        assert on_gpu.kld == pytest.approx(on_cpu.kld, abs=0.5)


def test_from_the_same_weights_batch_and_noise_a_step_on_the_gpu_reaches_the_cpu_s_weights(digits, cuda, monkeypatch):
    eps = torch.randn(128, 2)
    monkeypatch.setattr(torch, "randn", lambda *_, device, **__: eps.to(device))
    weights = {}
    for device in (CPU, cuda):
        torch.manual_seed(0)
        model = quest.VAE().to(device)
        optimizer = adam_of(model)
        quest.train_step(model, optimizer, digits[:128].to(device))
        weights[device.type] = model.fc1.weight.detach().cpu()
    # Adam's first step is lr * sign(gradient): a gradient of about 0 may differ in sign, and then by 2 lr
    differs = (weights["cuda"] - weights["cpu"]).abs() > 1e-5
    assert differs.float().mean() < 0.01


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_within_an_epoch_waits_for_the_gpu(digits, cuda, monkeypatch):
    x = digits.to(cuda)
    batches = list(loader_of(x))
    model = quest.VAE().to(cuda)
    optimizer = adam_of(model)
    quest.train_step(model, optimizer, batches[0])  # the first step sets up
    average_loss = quest.average_loss

    def read_at_the_end(loss, mu, logvar):
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()  # this waits: the check can fail
        torch.cuda.set_sync_debug_mode("default")
        return average_loss(loss, mu, logvar)

    monkeypatch.setattr(quest, "average_loss", read_at_the_end)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert quest.train_epoch(model, optimizer, batches, "Epoch").total > 100
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_that_is_not_there_is_one_message(tmp_path):
    result = run(tmp_path, "--device", f"cuda:{torch.cuda.device_count()}")
    assert result.returncode == 1
    assert "invalid device ordinal" in only_message(result) and list(tmp_path.iterdir()) == []


def test_a_gpu_without_free_memory_is_one_message(folder, cuda):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = [torch.empty(max(0, free - (600 << 20)), dtype=torch.uint8, device=cuda)]
    try:
        free, _ = torch.cuda.mem_get_info()
        while free > 64 << 20:  # what is left is less than a CUDA context and the digits need
            hog.append(torch.empty(32 << 20, dtype=torch.uint8, device=cuda))
            free, _ = torch.cuda.mem_get_info()
        result = run(folder)
    finally:
        hog.clear()
        torch.cuda.empty_cache()
    assert result.returncode == 1 and "out of memory" in result.stderr and "Traceback" not in result.stderr


def test_a_loss_that_diverges_on_the_gpu_is_said_as_on_the_cpu(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(quest, "LEARNING_RATE", 1e30)
    assert quest.main(["--epochs", "3"]) == 1
    assert "training diverged" in capsys.readouterr().err
    assert not (folder / "dreams" / "dream_sample.png").exists()
