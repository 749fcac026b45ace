"""What a user does with the script: the main job, its options, what it saves and says.

Needs the main job, 10 epochs on all digits.
"""

import dataclasses
import json
import re
import warnings
from types import SimpleNamespace

import faults
import jobs
import pytest
import torch
from harness import (
    SMALL,
    draws,
    expect_close,
    expect_equal,
    expect_picture,
    expect_same_files,
    expect_success,
    files_in,
    levels,
    run_job,
    run_script,
    terminal_lines,
)
from torchvision.utils import make_grid

import quest_12_1 as quest

NUMBER = r"(\d+\.\d\d)"


def told_of_epochs(result, epochs):
    """The losses that standard error tells: [(training loss, held-out loss), ...]."""
    said = re.findall(
        rf"Epoch (\d+)/{epochs}: loss {NUMBER}, held-out loss {NUMBER} nats per image",
        result.stderr,
    )
    told = [int(epoch) for epoch, *_ in said]
    assert told == list(range(1, epochs + 1)), (
        f"standard error tells the losses of the epochs {told}, not of 1 to {epochs}: "
        f"{terminal_lines(result.stderr)}"
    )
    return [(float(loss), float(held_out)) for _, loss, held_out in said]


def saved_by(job):
    return torch.load(job.output / "dream_model.pt")


def the_line(result):
    """What the one line of --json on standard output says."""
    assert result.stdout.count("\n") == 1, f"more than a line: {result.stdout!r}"
    return json.loads(result.stdout, parse_constant=pytest.fail)


# ---- The main job --------------------------------------------------------------------
def test_the_main_job_ends_with_the_message_that_names_loss_and_files(main_job):
    if main_job.result is None:
        pytest.skip("--trained: the main job was not run here")
    settings = quest.Settings()

    last_line = main_job.result.stdout.splitlines()[-1]

    numbers = re.search(
        rf"Held-out loss: {NUMBER} nats per image, BCE {NUMBER} \+ 1 x KLD {NUMBER}\.",
        last_line,
    )
    total, bce, kld = map(float, numbers.groups())
    assert total == pytest.approx(bce + kld, abs=0.02)
    assert re.match(r"Trained in \d+\.\d s on cpu\. ", last_line)
    assert last_line.endswith("dreams/dream_sample.png, dreams/dream_model.pt")
    assert told_of_epochs(main_job.result, settings.epochs)[-1][1] == total
    bars = re.findall(rf"Epoch (\d+)/{settings.epochs}: +\d+%", main_job.result.stderr)
    assert len(set(bars)) == settings.epochs, "not every epoch showed a bar"


def test_the_main_job_learns_the_digits(main_job):
    """13 seeds ended at 154.4 on average, with a standard deviation of 1.0."""
    losses = saved_by(main_job)["losses"]

    held_out = [loss["held_out"] for loss in losses]

    assert held_out[-1] < 158
    halfway = held_out[len(held_out) // 2]
    assert held_out[-1] < halfway < held_out[0], f"it does not fall: {held_out}"


def test_the_dreams_of_the_main_job_are_digits_and_no_noise(main_job, digits):
    """Each is nearer to some digit than noise is to any, and they differ."""
    dreams = saved_by(main_job)["dreams"][-1].flatten(1)
    noise = torch.rand_like(dreams)

    to_digits = torch.cdist(dreams, digits[:5000]).amin(dim=1)
    from_noise = torch.cdist(noise, digits[:5000]).amin(dim=1)

    farthest, noise_nearest = to_digits.max(), from_noise.min()
    assert farthest < noise_nearest, (
        f"a dream is {farthest:.2f} from each digit, noise {noise_nearest:.2f}"
    )
    assert dreams.amax(dim=1).median() > 0.5, "most dreams have no white"
    assert torch.pdist(dreams).median() > to_digits.median() / 2, "all dreams are alike"


# ---- Options -------------------------------------------------------------------------
WRONG = {
    "--epochs 0": "epochs must be at least 1",
    "--epochs ten": "invalid int value: 'ten'",
    "--hidden 0": "hidden must be at least 1",
    "--latent-dim 0": "latent_dim must be at least 1",
    "--batch-size 0": "batch_size must be at least 1",
    "--samples -3": "samples must be at least 1",
    "--beta -1": "beta must be",
    "--beta nan": "beta must be",
    "--learning-rate nan": "learning_rate must be",
    "--learning-rate 0": "learning_rate must be",
    "--seed -1": "seed must be",
    f"--seed {2**64}": "seed must be",
    "--dataset Nothing": "dataset must be one of MNIST",
    "--epo 3": "unrecognized arguments: --epo 3",
    "--gallery": "unrecognized arguments: --gallery",
}


@pytest.mark.parametrize(("arguments", "reason"), WRONG.items())
def test_a_wrong_command_line_exits_with_2_usage_and_reason(
    folder, monkeypatch, call, arguments, reason
):
    """Before a device is asked or anything is loaded."""
    monkeypatch.setattr(quest, "open_device", lambda *_: pytest.fail("asked a device"))
    before = files_in(folder)

    result = call(quest.main, *arguments.split())

    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("usage: ")
    assert reason in result.stderr
    expect_same_files(folder, before)


def test_help_tells_of_each_setting_and_its_default(call):
    result = call(quest.main, "--help")

    text = " ".join(result.stdout.split())
    assert result.returncode == 0
    for field in dataclasses.fields(quest.Settings):
        option = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{option} \w+ [^()]*\(default: {field.default}\)", text), (
            f"{option} is not told with its default {field.default}"
        )


CHOSEN = {
    "hidden": 30,
    "latent_dim": 3,
    "beta": 2.5,
    "epochs": 1,
    "batch_size": 300,
    "learning_rate": 0.01,
    "seed": 5,
    "samples": 16,
}


def test_each_setting_is_an_option_and_the_job_learns_with_it(folder, call):
    """The command line learns what `learn` does with the same settings."""
    options = []
    for name, value in CHOSEN.items():
        options += [f"--{name.replace('_', '-')}", str(value)]

    result = call(quest.main, "--device", "cpu", "--json", *options)

    expect_success(result)
    datasets = quest.load_data("data")
    x_train, x_test = (quest.images_on("cpu", dataset) for dataset in datasets)
    model, dreams, losses = quest.learn(x_train, x_test, quest.Settings(**CHOSEN))
    saved = torch.load("dreams/dream_model.pt")
    for settings in (the_line(result)["settings"], saved["settings"]):
        assert settings.items() >= {"dataset": "MNIST", **CHOSEN}.items()
    expect_close(saved["model"], model.state_dict(), rtol=1e-5, atol=1e-6)
    assert saved["losses"][0] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(saved["dreams"][-1], dreams[-1])


# ---- What is saved and told ----------------------------------------------------------
def test_json_is_one_line_with_the_result(small_run):
    answer = the_line(small_run.result)

    assert answer["success"] is True
    assert answer["files"] == [
        "runs/seed 3/dream_sample.png",
        "runs/seed 3/dream_model.pt",
    ]
    assert answer["message"].endswith(", ".join(answer["files"]))
    assert answer["device"] == "cpu"
    assert answer["settings"]["seed"] == 3
    assert answer["training_seconds"] > 0
    told = told_of_epochs(small_run.result, 2)
    for loss, (train, held_out) in zip(answer["losses"], told, strict=True):
        assert loss["train"] == pytest.approx(train, abs=0.006)
        assert loss["held_out"] == pytest.approx(held_out, abs=0.006)


def test_bars_leave_the_terminal_to_one_line_an_epoch(small_run):
    assert "%|" in small_run.result.stderr, "no bar was shown"

    lines = terminal_lines(small_run.result.stderr)

    for epoch, line in enumerate(lines, start=1):
        told = rf"Epoch {epoch}/2: loss {NUMBER}, held-out loss {NUMBER} nats per image"
        assert re.fullmatch(told, line), f"line {epoch} on the terminal is {line!r}"
    assert len(lines) == 2, f"two epochs left these lines on the terminal: {lines}"


@pytest.mark.parametrize("beta", ["1", "2.5", "0.05"])
def test_the_message_tells_the_last_epoch_and_the_weight_of_kld(
    folder, call, monkeypatch, beta
):
    losses = [
        {"train": 101.0, "held_out": 100.0, "bce": 90.0, "kld": 4.0},
        {"train": 99.0, "held_out": 120.0, "bce": 95.0, "kld": 10.0},
    ]
    made = quest.VAE(), [torch.zeros(1, 1, quest.SIDE, quest.SIDE)], losses
    monkeypatch.setattr(quest, "learn", lambda *_, **__: made)

    result = call(quest.main, "--device", "cpu", "--beta", beta)

    told = f"Held-out loss: 120.00 nats per image, BCE 95.00 + {beta} x KLD 10.00."
    assert told in result.stdout


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_steps_are_captured_on_a_gpu_alone(folder, call, monkeypatch, device):
    """The job's choice; what a captured step does, test_captured.py and a GPU show."""
    given = []

    def learn_of(x_train, x_test, settings, accelerate=None, **_):
        given.append(accelerate)
        raise quest.JobError("enough seen")

    monkeypatch.setattr(quest, "open_device", torch.device)
    monkeypatch.setattr(quest, "images_on", lambda device, dataset: torch.zeros(1, 1))
    monkeypatch.setattr(quest, "learn", learn_of)

    call(quest.main, "--device", device)

    assert given == [quest.CapturedStep if device == "cuda" else None]


def test_sample_and_model_are_all_that_is_saved(small_run):
    saved = sorted(path.name for path in small_run.output.iterdir())

    assert saved == ["dream_model.pt", "dream_sample.png"]
    assert not (small_run.folder / "dreams" / "dream_sample.png").exists()


def test_who_may_read_a_new_file_may_read_what_is_saved(small_run, tmp_path):
    """It is written into a temporary folder, where files could be their owner's."""
    (tmp_path / "new").touch()

    expected = (tmp_path / "new").stat().st_mode
    for path in small_run.output.iterdir():
        mode = path.stat().st_mode
        assert mode == expected, (
            f"{path.name} has the permissions {mode & 0o777:o}, "
            f"a new file has {expected & 0o777:o}"
        )


def test_the_saved_model_opens_with_torch_s_defaults_and_computes_what_was_told(
    small_run, digits
):
    saved = saved_by(small_run)

    settings = quest.Settings(**saved["settings"])
    model = quest.VAE(settings.hidden, settings.latent_dim)
    model.load_state_dict(saved["model"])

    x_test = digits[:2000]  # the held-out digits of a small run
    z, eps = draws(settings, len(x_test))
    told = the_line(small_run.result)["losses"]
    assert saved["losses"] == told
    computed = quest.evaluate(model, x_test, eps, settings.beta)
    expected = [told[-1][name] for name in ("held_out", "bce", "kld")]
    assert computed == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(saved["dreams"][-1], quest.dream(model, z))
    assert len(saved["dreams"]) == settings.epochs + 1


def test_the_picture_is_a_grid_of_the_last_dreams(small_run):
    dreams = saved_by(small_run)["dreams"][-1]

    picture = levels(small_run.output / "dream_sample.png")

    assert len(dreams) == 64
    expect_picture(picture, 255 * make_grid(dreams)[0], "dream_sample.png")


def test_the_time_of_training_is_learn_s_alone(folder, monkeypatch, call):
    """By a clock that only the two functions move."""
    now = [0.0]
    learn, load_data = quest.learn, quest.load_data

    def slow(function, seconds):
        def slowed(*arguments, **named):
            now[0] += seconds
            return function(*arguments, **named)

        return slowed

    def clock():
        return now[0]

    clocks = SimpleNamespace(perf_counter=clock, monotonic=clock, time=clock)
    monkeypatch.setattr(quest, "time", clocks)
    monkeypatch.setattr(quest, "learn", slow(learn, 7.0))
    monkeypatch.setattr(quest, "load_data", slow(load_data, 100.0))

    result = call(quest.main, "--device", "cpu", "--epochs", "1", "--json")

    assert the_line(result)["training_seconds"] == 7.0


def test_another_data_set_is_trained_by_its_name(folder, small_run, fashion, call):
    options = ["--device", "cpu", "--dataset", "FashionMNIST", *SMALL]

    result = call(quest.main, *options)

    expect_success(result)
    assert "MNIST" not in the_line(result)["message"]
    saved = torch.load("dreams/dream_model.pt")
    assert saved["settings"]["dataset"] == "FashionMNIST"
    expected = saved_by(small_run)["losses"][-1]
    assert saved["losses"][-1] == pytest.approx(expected, rel=1e-5)


# ---- The same seed -------------------------------------------------------------------
@pytest.mark.parametrize(
    "surroundings",
    [None, faults.no_bars, faults.folders_cannot_be_removed],
    ids=["as before", "without bars", "as on NFS"],
)
def test_the_same_seed_gives_the_same_bytes(folder, small_run, surroundings):
    result = run_script(folder, *SMALL, fault=surroundings)

    expect_success(result)
    assert ("it/s]" in result.stderr) == (surroundings is not faults.no_bars)
    assert told_of_epochs(result, 2) == told_of_epochs(small_run.result, 2)
    for name in ("dream_sample.png", "dream_model.pt"):
        ours = (folder / "dreams" / name).read_bytes()
        same = ours == (small_run.output / name).read_bytes()
        assert same, f"{name} has other bytes"


def test_another_seed_gives_other_dreams_and_weights(folder, small_run, call):
    other = ["--device", "cpu", *SMALL, "--seed", "4"]

    expect_success(call(quest.main, *other))

    saved, before = torch.load("dreams/dream_model.pt"), saved_by(small_run)
    differ = saved["dreams"][-1] != before["dreams"][-1]
    assert differ.any(), "the dreams are the same"
    for name, weight in saved["model"].items():
        assert (weight != before["model"][name]).any(), f"{name} is the same"


# ---- The process and its state -------------------------------------------------------
def test_a_job_leaves_behind_the_seed_and_flushed_denormals_alone(folder):
    result = run_job(folder, jobs.import_learn_and_run_main)

    expect_success(result)
    before, imported, learned, ran = json.loads(result.stdout.splitlines()[-1])
    assert imported == before, "the import changed something"
    assert changes(before, learned) == {"seed"}
    assert changes(before, ran) == {"seed", "denormals"}


def changes(before, after):
    return {name for name in before if before[name] != after[name]}


def test_the_import_parses_loads_and_writes_nothing(folder):
    before = files_in(folder)

    result = run_job(folder, jobs.import_alone)

    expect_success(result)
    assert result.stdout == result.stderr == ""
    now = set(files_in(folder))
    assert now == set(before)


def test_warnings_of_a_user_s_own_lines_are_heard(folder, call, monkeypatch):
    take_step = quest.train_step

    def warning_step(*arguments):
        warnings.warn("a user's own warning", stacklevel=1)
        return take_step(*arguments)

    monkeypatch.setattr(quest, "train_step", warning_step)

    with pytest.warns(UserWarning, match="a user's own warning"):
        call(quest.main, "--device", "cpu", "--epochs", "1")


def test_denormals_are_flushed_in_every_thread_that_trains(folder):
    result = run_script(folder, "--epochs", "1", fault=faults.denormals_counted)

    expect_success(result)


def test_main_returns_in_a_notebook_and_runs_again(folder, call):
    first = call(quest.main, "--device", "cpu", "--epochs", "1", "--output", "one")
    second = call(quest.main, "--device", "cpu", "--epochs", "1", "--output", "two")

    expect_success(first)
    expect_success(second)
    one, two = (
        torch.load(f"{name}/dream_model.pt")["model"] for name in ("one", "two")
    )
    expect_equal(one, two)
