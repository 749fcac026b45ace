"""What a user does and sees: the whole job, its options, and its refusals."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from harness import NO_NETWORK, ROOT, only_message, run
from PIL import Image

import quest_12_1 as quest

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@pytest.fixture(scope="module")
def main_job(tmp_path_factory, unpacked):
    """The user's main job without a GPU, whole: 10 epochs on real MNIST. 20 s, for the figure the README promises."""
    folder = tmp_path_factory.mktemp("main_job")
    shutil.copytree(unpacked / "data", folder / "data")
    return folder, run(folder, "--device", "cpu")


def test_the_main_job_learns_mnist_and_ends_with_the_message_that_names_the_dream(main_job):
    folder, result = main_job
    assert result.returncode == 0, result.stderr
    assert (folder / "dreams" / "dream_sample.png").is_file()
    last = result.stdout.splitlines()[-1]
    said = re.fullmatch(
        r"The dream is ready: dreams/dream_sample\.png "
        r"\(held-out loss (\d+\.\d\d) nats an image, trained in \d+\.\d s on .+\)\.",
        last,
    )
    assert said, last
    assert 140 < float(said[1]) <= 156.5


def test_the_main_job_shows_a_bar_an_epoch_ending_with_the_loss_and_its_parts(main_job):
    _, result = main_job
    ends = re.findall(
        r"Epoch (\d+)/10: 100%.*469/469.*loss (\d+\.\d\d) nats an image \(BCE (\d+\.\d\d) \+ KLD (\d+\.\d\d)\)",
        result.stderr.replace("\r", "\n"),
    )
    by_epoch = {int(epoch): [float(number) for number in numbers] for epoch, *numbers in ends}
    assert sorted(by_epoch) == list(range(1, 11))
    for total, bce, kld in by_epoch.values():
        assert total == pytest.approx(bce + kld, abs=0.02) and kld > 2
    assert by_epoch[10][0] < by_epoch[5][0] < by_epoch[1][0]


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


def test_the_same_seed_dreams_the_same_bytes_and_another_seed_others(folder, nursery):
    def dream(seed):
        assert nursery.run(folder, "--epochs", "1", "--seed", seed).returncode == 0
        return (folder / "dreams" / "dream_sample.png").read_bytes()

    first = dream("7")
    assert first == dream("7") != dream("8")


def test_a_fresh_clone_trains_without_any_network(clone, nursery):
    result = nursery.run(clone, "--epochs", "1", **NO_NETWORK)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (clone / "dreams").iterdir()) == [".lock", "dream_sample.png"]


@needs_no_gpu
def test_without_a_gpu_it_says_so_at_once_and_touches_nothing(tmp_path):
    result = run(tmp_path)
    assert result.returncode == 1
    message = only_message(result)
    assert "a CUDA GPU is required" in message and "python quest_12_1.py --device cpu" in message
    with pytest.raises((RuntimeError, AssertionError)) as reason:
        torch.zeros(1, device="cuda")
    assert str(reason.value).split(".")[0] in message
    assert list(tmp_path.iterdir()) == []


def test_help_tells_every_option(tmp_path):
    result = run(tmp_path, "--help")
    assert result.returncode == 0 and result.stderr == ""
    for option in ("--device", "--epochs", "--seed", "--gallery", "--json"):
        assert re.search(rf"^  {option}\b.*\S", result.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--epochs", "0"], "whole number from 1"),
        (["--epochs", "ten"], "whole number from 1"),
        (["--epochs", "2.5"], "whole number from 1"),
        (["--seed", "-1"], "whole number from 0"),
        (["--seed", str(2**64)], "whole number from 0"),
        (["--device", "banana"], "cuda, cuda:1, cpu or mps"),
        (["--device", ""], "cuda, cuda:1, cpu or mps"),
        (["--device", "cuda:256"], "cuda, cuda:1, cpu or mps"),
        (["--batch-size", "3"], "unrecognized arguments: --batch-size 3"),
        (["--epo", "3"], "unrecognized arguments: --epo 3"),
        (["--epochs"], "expected one argument"),
    ],
)
def test_a_value_that_makes_no_sense_is_a_usage_error_of_one_line(tmp_path, monkeypatch, capsys, arguments, allowed):
    monkeypatch.chdir(tmp_path)
    assert quest.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and allowed in err
    assert list(tmp_path.iterdir()) == []


def test_a_usage_error_ends_the_process_with_2(tmp_path):
    result = run(tmp_path, "--epochs", "0")
    assert result.returncode == 2 and only_message(result).count("\n") == 1


def test_json_puts_one_line_on_standard_output_with_the_documented_keys(folder, nursery):
    result = nursery.run(folder, "--json", "--epochs", "1", "--seed", "3")
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("\n")
    answer = json.loads(result.stdout)
    assert set(answer) == {
        "success", "files", "message", "device", "device_name", "epochs", "seed", "training_seconds", "train_loss",
        "held_out_loss",
    }  # fmt: skip
    assert answer["success"] is True and answer["files"] == ["dreams/dream_sample.png"]
    assert (answer["device"], answer["epochs"], answer["seed"]) == ("cpu", 1, 3)
    assert 0 < answer["training_seconds"] < 60
    for loss in (answer["train_loss"], answer["held_out_loss"]):
        assert loss["total"] == pytest.approx(loss["bce"] + loss["kld"]) and 150 < loss["total"] < 220
    assert f"held-out loss {answer['held_out_loss']['total']:.2f}" in answer["message"]
    assert f"loss {answer['train_loss']['total']:.2f} nats" in result.stderr and "Held-out loss" in result.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["--device", "meta"], 1), (["--epochs", "0"], 2)])
def test_json_tells_a_failure_too_in_one_line_with_the_same_exit_code(tmp_path, monkeypatch, capsys, arguments, code):
    monkeypatch.chdir(tmp_path)
    assert quest.main(["--json", *arguments]) == code
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert out.count("\n") == 1 and answer["success"] is False
    assert err == f"quest_12_1.py: {answer['message']}\n"


def test_importing_the_module_has_no_effect(tmp_path):
    def state_after(module):
        program = (
            f"import sys, signal, socket, torch; sys.path.insert(0, {str(ROOT)!r}); torch.manual_seed(5); "
            f"import {module}; print(torch.rand(3), torch.tensor(1e-40) == 0, torch.cuda.is_initialized(), "
            "socket.getdefaulttimeout(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))"
        )
        command = [sys.executable, "-c", program, "--epochs", "nonsense"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    ours, torchvisions = state_after("quest_12_1"), state_after("torchvision")
    assert (ours.stdout, ours.stderr) == (torchvisions.stdout, "")
    assert list(tmp_path.iterdir()) == []


def test_data_and_dreams_belong_to_the_working_folder(folder, nursery):
    before = sorted(path for path in ROOT.rglob("*.png"))
    nested = folder / "else where"
    nested.mkdir()
    (folder / "data").rename(nested / "data")
    assert nursery.run(nested, "--epochs", "1").returncode == 0
    assert (nested / "dreams" / "dream_sample.png").is_file() and not (folder / "dreams").exists()
    assert sorted(path for path in ROOT.rglob("*.png")) == before
