"""What a user does and sees: the whole job, its options, its recipe changed, and its refusals."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from harness import ROOT, SCRIPT, SMALL, edited, levels, prepare, put_template, run_small

import quest_12_1 as quest

README = (ROOT / "README.md").read_text()
N = r"(\d+\.\d\d)"
END = rf"Trained in \d+\.\d s on cpu\. Held-out loss: {N} nats per image, BCE {N} \+ 1 x KLD {N}\. The dream is ready: "


def epoch_lines(result, epochs):
    """What standard error says of each epoch beside the bars: training loss and held-out loss."""
    said = re.findall(rf"Epoch (\d+)/{epochs}: loss {N}, held-out loss {N} nats per image", result.stderr)
    assert [int(epoch) for epoch, *_ in said] == list(range(1, epochs + 1))
    return [(float(loss), float(held_out)) for _, loss, held_out in said]


def test_the_main_job_shows_a_bar_an_epoch_learns_mnist_and_ends_with_the_message_that_names_the_dream(main_job):
    folder, result = main_job
    assert result.returncode == 0 and (folder / "dreams" / "dream_sample.png").is_file(), result.stderr
    said = re.fullmatch(END + r"dreams/.*, dreams/dream_plane\.html, dreams/dream_sample\.png\n", result.stdout)
    total, bce, kld = (float(number) for number in said.groups())
    assert 151.5 < total < 156.5 and total == pytest.approx(bce + kld, abs=0.02) and 5 < kld < 6.5
    assert set(re.findall(r"Epoch (\d+)/10:.*/469 \[", result.stderr)) == {str(epoch) for epoch in range(1, 11)}
    by_epoch = epoch_lines(result, 10)
    assert by_epoch[9][1] == total and by_epoch[0][1] < 175
    assert all(by_epoch[9][k] < by_epoch[4][k] < by_epoch[0][k] for k in (0, 1))


def test_the_dream_is_an_8x8_grid_of_digits_and_no_noise(main_job, held_out):
    pixels = levels(main_job[0] / "dreams" / "dream_sample.png") / 255
    cells = pixels[2:].unfold(0, 28, 30)[:, 2:].unfold(1, 28, 30).reshape(64, 784)
    nearest = torch.cdist(torch.cat((cells, torch.rand(64, 784))), held_out[0][:5000]).min(dim=1).values
    assert pixels.shape == (242, 242) and nearest[:64].max() < 8 < 12 < nearest[64:].min()  # noise resembles no digit
    assert (cells.max(dim=1).values > 0.5).all() and (cells.mean(dim=1) < 0.3).all()
    assert torch.pdist(cells).median() > 4  # 64 different dreams, not one


WRONG = {
    "--epochs 0": "--epochs must be at least 1",
    "--epochs ten": "invalid int value: 'ten'",
    "--seed -1": "--seed must be from 0 to",
    f"--seed {2**64}": "--seed must be from 0 to",
    "--epo 3": "unrecognized arguments: --epo 3",
    "--gallery": "it needs LATENT_DIM = 2",
}


@pytest.mark.parametrize(("arguments", "reason"), WRONG.items())
def test_a_wrong_command_line_exits_with_2_usage_and_reason(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quest, "LATENT_DIM", 3)
    with pytest.raises(SystemExit, match="2"):
        quest.main(arguments.split())
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: ") and reason in err
    assert list(tmp_path.iterdir()) == []


def test_json_puts_one_line_on_standard_output_with_the_documented_keys(folder):
    result = run_small(folder, "--json", "--epochs", "2", "--seed", "3")
    assert result.returncode == 0 and result.stdout.count("\n") == 1 and result.stdout.endswith("\n")
    answer = json.loads(result.stdout)
    keys = re.search(r"With `--json`.*?(?=\n\n)", README, re.DOTALL)[0]
    assert set(answer) | {"total", "bce", "kld"} == set(re.findall(r"`(\w+)`", keys))
    assert answer["success"] is True and answer["files"] == ["dreams/dream_sample.png"]
    assert (answer["device"], answer["epochs"], answer["seed"], answer["output"]) == ("cpu", 2, 3, "dreams")
    assert re.fullmatch(END + r"dreams/dream_sample\.png", answer["message"])
    loss, (first, second), held_out = answer["held_out_loss"], answer["train_losses"], answer["held_out_losses"]
    assert loss["total"] == pytest.approx(loss["bce"] + loss["kld"]) and loss["total"] == held_out[1]
    assert 180 < held_out[1] < second < first < 480 and held_out[1] < held_out[0]
    assert epoch_lines(result, 2) == [
        (round(first, 2), round(held_out[0], 2)),
        (round(second, 2), round(held_out[1], 2)),
    ]


def test_the_time_of_training_is_that_of_all_epochs_and_of_nothing_else(folder):
    slow = """if True:
        import time, torch
        adam, load = torch.optim.Adam.step, torchvision.datasets.MNIST._load_data
        torch.optim.Adam.step = lambda *arguments: (time.sleep(0.05), adam(*arguments))[1]
        torchvision.datasets.MNIST._load_data = lambda self: (time.sleep(2), load(self))[1]
    """
    result = run_small(folder, "--json", "--epochs", "3", prelude="import torchvision\n" + slow)
    assert 3 * 16 * 0.05 < json.loads(result.stdout)["training_seconds"] < 6


def test_without_a_bar_the_job_is_the_same(folder):
    """TQDM_DISABLE is tqdm's own variable, usual in batch jobs; tqdm reads it when it is imported."""
    job = [sys.executable, "-c", f"{SMALL}import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"]
    ends = []
    for name, variables in {"bar": {}, "none": {"TQDM_DISABLE": "1"}}.items():
        options = ["--device", "cpu", "--epochs", "2", "--output", name]
        result = subprocess.run(
            job + options, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=True
        )
        assert ("16/16" in result.stderr or "it/s]" in result.stderr) == (name == "bar")
        ends.append((epoch_lines(result, 2), (folder / name / "dream_sample.png").read_bytes()))
    assert ends[0] == ends[1]


def test_pasted_into_a_notebook_s_cell_the_script_saves_the_gallery_too(tmp_path):
    cell = tmp_path / "cell.py"
    cell.write_text(
        f"import sys\ncell = {{'__name__': 'cell'}}\nexec(open({str(SCRIPT)!r}).read(), cell)\n"
        "sys.exit(cell['main'](sys.argv[1:]))"
    )
    result = run_small(prepare(tmp_path, gallery=True), "--gallery", "--epochs", "1", script=cell)
    assert result.returncode == 0 and (tmp_path / "dreams" / "dream_plane.html").is_file(), result.stderr


def test_where_a_notebook_has_set_a_default_device_the_job_gives_the_same_picture(folder):
    run_small(folder, "--epochs", "1", "--output", "none")
    result = run_small(folder, "--epochs", "1", "--output", "meta", prelude="torch.set_default_device('meta')")
    assert result.returncode == 0, result.stderr
    assert (folder / "none/dream_sample.png").read_bytes() == (folder / "meta/dream_sample.png").read_bytes()


def test_help_needs_no_docstrings(monkeypatch, capsys):
    script = compile(SCRIPT.read_text(), str(SCRIPT), "exec", optimize=2)  # as python -OO, which removes docstrings
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit, match="0"):
        exec(script, {"__name__": "__main__", "__doc__": None})
    out, err = capsys.readouterr()
    options = re.findall(r"^\| `(--\w+)", README, re.MULTILINE)
    assert err == "" and len(options) == 6 and all(option in out for option in options)


SETTINGS = {"EPOCHS": 2, "BATCH_SIZE": 300, "HIDDEN": 30, "LEARNING_RATE": 0.01, "LATENT_DIM": 10, "BETA": 30}
SHOWN = {"BATCH_SIZE": "/7 [", "BETA": "+ 30 x KLD"}  # 7 batches of the 2,000 digits that these runs train on


@pytest.mark.parametrize(("name", "value"), SETTINGS.items())
def test_another_value_in_the_settings_is_what_the_job_trains_with(folder, gallery, name, value):
    epochs = [] if name == "EPOCHS" else ["--epochs", "2"]
    result = run_small(folder, "--json", "--seed", "3", *epochs, script=edited(folder, name, value))
    assert result.returncode == 0 and SHOWN.get(name, "Epoch 2/2: loss") in result.stderr + result.stdout, result.stderr
    losses, usual_losses = json.loads(result.stdout)["train_losses"], gallery[1]["train_losses"]
    assert losses == usual_losses if name == "EPOCHS" else losses[0] != usual_losses[0]


def test_another_data_set_of_the_same_format_needs_one_changed_line(tmp_path):
    """Fashion-MNIST itself is not in the repository: MNIST's files stand in for its own, which have the same names."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "FashionMNIST").symlink_to(ROOT / "data" / "MNIST")
    script = edited(tmp_path, "DATASET", "datasets.FashionMNIST")
    put_template(tmp_path)
    result = run_small(tmp_path, "--gallery", "--epochs", "1", script=script)
    assert result.returncode == 0 and not (tmp_path / "data" / "MNIST").exists(), result.stderr


def test_the_readme_s_python_shows_the_loss_above_minus_log_p_as_printed(main_job, monkeypatch, capsys):
    monkeypatch.chdir(main_job[0])  # after the gallery of the README's own command
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(snippet, {})
    printed, told = (
        re.search(r"loss (\d+\.\d), -log p\(x\) (\d+\.\d)", said).groups() for said in (capsys.readouterr().out, README)
    )
    assert float(printed[0]) > float(printed[1]) + 4
    assert [float(number) for number in printed] == pytest.approx([float(number) for number in told], abs=0.5)


def test_the_readme_s_lines_for_a_digit_of_your_choice_turn_the_script_into_one_that_trains(folder):
    (lines,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    *replacing, new = [line.split("  # in ")[0] for line in lines.splitlines()]
    script = SCRIPT.read_text()
    olds = [
        "SAMPLES = 64.*",
        ".*images.flatten.*",
        ".*self.fc1 =.*",
        ".*self.fc3 =.*",
        ".*return self.decode.*",
        ".*bce = .*",
    ]
    for old, line in zip(olds, replacing, strict=True):
        script, count = re.subn(f"(?m)^{old}$", lambda _, line=line: line, script)
        assert count == 1, old
    (folder / SCRIPT.name).write_text(script.replace("    dreams = [", f"{new}\n    dreams = ["))
    result = run_small(folder, "--epochs", "1", script=folder / SCRIPT.name)
    assert result.returncode == 0, result.stderr
    assert levels(folder / "dreams" / "dream_sample.png").shape == (302, 242)  # ten rows of eight


STATE = """
import os, signal, socket
def state():
    denormal = torch.full((1,), 1e-40) * torch.ones(1)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_rng_state().tolist(), signal.getsignal(signal.SIGINT), socket.getdefaulttimeout(), \\
        str(torch.get_default_device()), denormal.item() > 0, precision
before = state()
import quest_12_1 as quest
assert state() == before and before[4:] == (True, "none")
assert not torch.cuda.is_initialized() and os.listdir() == ["data"]
images = [quest.images_on("cpu", dataset) for dataset in quest.load_data("data")]
quest.learn(*images, epochs=1)
assert state()[1:] == before[1:] and state()[0] != before[0]
learn = quest.learn
def watched(*arguments):
    assert state()[4:] == (False, "bf16")  # before training
    return learn(*arguments)
quest.learn = watched
assert quest.main(["--device", "cpu", "--epochs", "1"]) == 0
assert state()[1:4] == before[1:4] and state()[4:] == (False, "bf16")
"""


def test_of_the_process_s_state_an_import_sets_none_learn_the_seed_and_main_two_things_of_the_cpu(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    subprocess.run([sys.executable, "-c", SMALL + STATE, "--epochs", "nonsense"], cwd=folder, check=True)
