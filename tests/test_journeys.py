"""What a user does and sees: the whole job, its options, its recipe changed, and its refusals."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from harness import GPUS, NO_NETWORK, RAW, ROOT, SCRIPT, only_message, run, run_small
from PIL import Image

import quest_12_1 as quest


@pytest.fixture(scope="module")
def main_job(tmp_path_factory, unpacked):
    """The user's main job without a GPU, whole: 10 epochs on real MNIST. 20 s, for the figure the README promises."""
    folder = tmp_path_factory.mktemp("main_job")
    shutil.copytree(unpacked / "data", folder / "data")
    return folder, run(folder, "--device", "cpu")


def test_the_main_job_shows_a_bar_an_epoch_learns_mnist_and_ends_with_the_message_that_names_the_dream(main_job):
    folder, result = main_job
    assert result.returncode == 0 and (folder / "dreams" / "dream_sample.png").is_file(), result.stderr
    said = re.fullmatch(
        r"The dream is ready: dreams/dream_sample\.png \(trained in \d+\.\d s on .+, "
        r"held-out loss (\d+\.\d\d) nats per image: BCE (\d+\.\d\d) \+ KLD (\d+\.\d\d)\)\.\n",
        result.stdout,
    )
    total, bce, kld = (float(number) for number in said.groups())
    assert 140 < total <= 156.5 and total == pytest.approx(bce + kld, abs=0.02) and kld > 2
    bars = result.stderr.replace("\r", "\n")
    ends = re.findall(r"Epoch (\d+)/10: 100%.*469/469.*loss (\d+\.\d\d) nats per image", bars)
    by_epoch = {int(epoch): float(loss) for epoch, loss in ends}
    assert sorted(by_epoch) == list(range(1, 11)) and by_epoch[10] < by_epoch[5] < by_epoch[1]


def test_the_dream_is_an_8x8_grid_of_digits_and_no_noise(main_job, digits):
    folder, _ = main_job
    with Image.open(folder / "dreams" / "dream_sample.png") as picture:
        assert picture.size == (242, 242) and picture.format == "PNG"
        pixels = torch.tensor(list(picture.convert("L").tobytes())).view(242, 242) / 255
    cells = pixels[2:].unfold(0, 28, 30)[:, 2:].unfold(1, 28, 30).reshape(64, 784)
    distances = torch.cdist(cells, digits[:5000])  # each dream resembles some real digit; noise resembles none
    noise = torch.cdist(torch.rand(64, 784), digits[:5000]).min(dim=1).values
    assert distances.min(dim=1).values.max() < 8 < 12 < noise.min()
    assert (cells.max(dim=1).values > 0.5).all() and (cells.mean(dim=1) < 0.3).all()
    assert torch.pdist(cells).median() > 4  # 64 different dreams, not one


@pytest.mark.skipif(GPUS > 0, reason="a CUDA device is here")
def test_without_a_gpu_it_says_so_at_once_and_touches_nothing(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 1
    message = only_message(result)
    assert "a CUDA GPU is required" in message and "python quest_12_1.py --device cpu" in message
    with pytest.raises((RuntimeError, AssertionError), match=message.split(": ")[2].split(".")[0]):
        torch.zeros(1, device="cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--epochs 0", "--epochs must be at least 1"),
        ("--epochs ten", "invalid int value: 'ten'"),
        ("--seed -1", "--seed must be from 0 to"),
        (f"--seed {2**64}", "--seed must be from 0 to"),
        ("--epo 3", "unrecognized arguments: --epo 3"),
    ],
)
def test_a_wrong_command_line_exits_with_2_usage_and_reason(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        quest.main(arguments.split())
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: ") and reason in err
    assert list(tmp_path.iterdir()) == []


def test_json_puts_one_line_on_standard_output_with_the_documented_keys(folder):
    result = run_small(folder, "--json", "--epochs", "2", "--seed", "3")
    assert result.returncode == 0 and result.stdout.count("\n") == 1 and result.stdout.endswith("\n")
    answer = json.loads(result.stdout)
    assert set(answer) == set(
        "success files message device device_name epochs seed training_seconds train_losses held_out_loss".split()
    )
    assert answer["success"] is True and answer["files"] == ["dreams/dream_sample.png"]
    assert (answer["device"], answer["epochs"], answer["seed"]) == ("cpu", 2, 3)
    assert 0 < answer["training_seconds"] < 60
    loss, first, second = answer["held_out_loss"], *answer["train_losses"]
    assert loss["total"] == pytest.approx(loss["bce"] + loss["kld"]) and 150 < loss["total"] < second < first
    assert f"held-out loss {loss['total']:.2f} nats per image" in answer["message"]
    assert f"loss {first:.2f} nats" in result.stderr and f"loss {second:.2f} nats" in result.stderr


# Students change the recipe ------------------------------------------------------------------------------------------
def edited(folder, name, value):
    """A copy of the script with another value for one constant of its recipe."""
    text, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", SCRIPT.read_text(), flags=re.MULTILINE)
    assert count == 1
    (folder / "quest_12_1.py").write_text(text)
    return folder / "quest_12_1.py"


@pytest.fixture(scope="module")
def usual_losses(unpacked):
    return json.loads(run_small(unpacked, "--json").stdout)["train_losses"]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("EPOCHS", 2, "Epoch 2/2: 100%"),
        ("BATCH_SIZE", 300, "7/7"),  # batches of the 2,000 digits that these runs train on
        ("HIDDEN", 30, "Epoch 10/10: 100%"),
        ("LEARNING_RATE", 0.01, "Epoch 10/10: 100%"),
        ("LATENT_DIM", 10, "Epoch 10/10: 100%"),
    ],
)
def test_another_value_in_the_recipe_is_what_the_job_trains_with(folder, usual_losses, monkeypatch, name, value, shown):
    result = run_small(folder, "--json", script=edited(folder, name, value))
    assert result.returncode == 0 and shown in result.stderr, result.stderr
    losses = json.loads(result.stdout)["train_losses"]
    assert losses == usual_losses[:2] if name == "EPOCHS" else losses[0] != usual_losses[0]
    monkeypatch.setattr(quest, name, value)
    model = quest.VAE()
    assert model.fc1.weight.shape == model.fc4.weight.T.shape == (quest.HIDDEN, 784)
    assert model.fc21.weight.shape == model.fc22.weight.shape == (quest.LATENT_DIM, quest.HIDDEN)


def test_the_gallery_of_another_latent_space_than_a_plane_is_refused_before_training(tmp_path):
    result = run_small(tmp_path, "--gallery", script=edited(tmp_path, "LATENT_DIM", 3))
    assert result.returncode == 2 and "it needs LATENT_DIM = 2" in result.stderr
    assert not (tmp_path / "dreams").exists()


def test_another_data_set_of_the_same_format_needs_one_changed_line(folder):
    """Fashion-MNIST itself is not in the repository: MNIST's archives stand in for its own."""
    (folder / RAW).parent.rename(folder / "data" / "FashionMNIST")
    stand_in = "torchvision.datasets.FashionMNIST.resources = torchvision.datasets.MNIST.resources"
    script = edited(folder, "DATASET", "datasets.FashionMNIST")
    result = run_small(folder, "--gallery", "--epochs", "1", script=script, prelude=stand_in, **NO_NETWORK)
    assert result.returncode == 0, result.stderr
    assert not (folder / RAW).exists()


# What callers rely on ------------------------------------------------------------------------------------------------
def test_the_readme_s_python_runs_as_printed(unpacked, tmp_path):
    """One epoch on all digits, since a reader types it so: 10 s."""
    (tmp_path / "data").symlink_to(unpacked / "data")
    shutil.copy(SCRIPT, tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True, capture_output=True)
    with Image.open(tmp_path / "digit.png") as picture:
        assert picture.size == (28, 28)
    quest.VAE().load_state_dict(torch.load(tmp_path / "vae.pt"))


def test_importing_the_module_has_no_effect(tmp_path):
    program = f"""
import signal, socket, sys, torch, torchvision
sys.path.insert(0, {str(ROOT)!r})
def state():
    return torch.get_rng_state().tolist(), signal.getsignal(signal.SIGINT), socket.getdefaulttimeout(), sys.stdout
before = state()
import quest_12_1
assert state() == before and not torch.cuda.is_initialized() and torch.tensor(1e-40) * 1 > 0  # denormals are kept
"""
    command = [sys.executable, "-c", program, "--epochs", "nonsense"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []
