"""What a user does and sees: the whole job, its options, its recipe changed, and its refusals."""

import json
import re

import pytest
import torch
from harness import ROOT, SCRIPT, levels, run_small

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
    "--epochs 0": "--epochs must be at least 1", "--epochs ten": "invalid int value: 'ten'",
    "--seed -1": "--seed must be from 0 to", f"--seed {2**53}": "--seed must be from 0 to",
    "--epo 3": "unrecognized arguments: --epo 3", "--gallery": "it needs LATENT_DIM = 2",
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "reason"), WRONG.items())
def test_a_wrong_command_line_exits_with_2_usage_and_reason(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quest, "LATENT_DIM", 3)
    with pytest.raises(SystemExit, match="2"):
        quest.main(arguments.split())
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: ") and reason in err and list(tmp_path.iterdir()) == []


def test_json_puts_one_line_on_standard_output_with_the_documented_keys(gallery):
    answer = gallery[1]
    keys = re.search(r"With `--json`.*?(?=\n\n)", README, re.DOTALL)[0]
    assert {*answer, *answer["losses"][0]} == set(re.findall(r"`(\w+)`", keys)) and answer["success"] is True
    assert [answer[key] for key in ("device", "epochs", "seed", "output")] == ["cpu", 2, 3, "runs/seed 3"]
    assert re.fullmatch(END + ", ".join(answer["files"]), answer["message"])
    (first, first_held_out, *_), (second, held_out, bce, kld) = (loss.values() for loss in answer["losses"])
    assert 180 < held_out < second < first < 480 and held_out < first_held_out and held_out == pytest.approx(bce + kld)


def test_the_time_of_training_is_that_of_all_epochs_and_of_nothing_else(folder):
    slow = """import time
adam, load = torch.optim.Adam.step, torchvision.datasets.MNIST._load_data
torch.optim.Adam.step = lambda *arguments: (time.sleep(0.05), adam(*arguments))[1]
torchvision.datasets.MNIST._load_data = lambda self: (time.sleep(2), load(self))[1]"""
    result = run_small(folder, "--json", "--epochs", "3", prelude=slow)
    assert 3 * 16 * 0.05 < json.loads(result.stdout)["training_seconds"] < 6


CELL = f"import sys; cell = {{'__name__': ''}}; exec(open({str(SCRIPT)!r}).read(), cell); cell['main'](sys.argv[1:])"
ODD = {  # Python to execute first
    "no bar": """import os; os.environ["TQDM_DISABLE"] = "1"  # tqdm's own variable, usual in batch jobs, read on import
for name in [name for name in sys.modules if name.startswith("tqdm")]: del sys.modules[name]""",
    "in a cell": f"sys.argv[0] = 'cell.py'; open('cell.py', 'w').write({CELL!r})",
    "as on NFS": "def rmdir(path, **_): raise OSError(39, 'Directory not empty', path)\nimport os; os.rmdir = rmdir",
    # Fashion-MNIST is not in the repository: MNIST's files stand in for its own, which have the same names.
    "another data set": """import os; os.rename('data', 'd'); os.mkdir('data')
os.symlink('../d/MNIST', 'data/FashionMNIST')
text = open(sys.argv[0]).read().replace('DATASET = datasets.', 'DATASET = datasets.Fashion')
sys.argv[0] = 'fashion.py'; open('fashion.py', 'w').write(text)""",
    "without the gallery": "sys.argv.remove('--gallery')",
    "another seed": "sys.argv += ['--seed', '4']",
}


@pytest.mark.parametrize("name", ODD)
def test_the_seed_alone_decides_each_byte_also_without_a_bar_in_a_notebook_and_on_nfs(folder, gallery, name):
    job = ["--gallery", "--epochs", "2", "--seed", "3", "--output", "again"]
    result = run_small(folder, *job, prelude=f"import sys\n{ODD[name]}")
    assert result.returncode == 0 and ("it/s]" in result.stderr) == (name != "no bar"), result.stderr
    told = [(round(loss["train"], 2), round(loss["held_out"], 2)) for loss in gallery[1]["losses"]]
    assert (epoch_lines(result, 2) == told) == (name != "another seed")
    saved = list((folder / "again").glob("dream_*"))
    assert len(saved) == (1 if name == "without the gallery" else 7)
    same = [path.read_bytes() == (gallery[0] / path.name).read_bytes() for path in saved]
    assert not any(same) if name == "another seed" else all(same)


def test_the_readme_shows_the_options_of_help_and_the_committed_pictures(capsys):
    with pytest.raises(SystemExit, match="0"):
        quest.main(["--help"])
    options = re.findall(r"^\| `(--\w+)", README, re.MULTILINE)
    assert len(options) == 6 and {*options, "--help"} == set(re.findall(r"--\w+", capsys.readouterr().out))
    pictures = {path.name for path in (ROOT / "dreams").glob("example_*")}
    assert set(re.findall(r'"dreams/(example_\w+\.\w+)"', README)) == pictures


def test_the_readme_s_python_shows_the_loss_above_minus_log_p_from_random_z_as_printed(main_job, monkeypatch, capsys):
    monkeypatch.chdir(main_job[0])  # after the gallery of the README's own command
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(snippet, {})
    line, printed = r"loss (\d+\.\d), -log p\(x\) (\d+\.\d)", capsys.readouterr().out
    (loss, minus_log_p), told = ([float(n) for n in re.search(line, said).groups()] for said in (printed, README))
    assert loss > minus_log_p + 3 and [loss, minus_log_p] == pytest.approx(told, abs=1)


def test_the_lines_that_made_the_example_of_a_cloud_make_it_again(main_job, monkeypatch):
    monkeypatch.chdir(main_job[0])
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "dreams" / "README.md").read_text(), re.DOTALL)
    exec(lines, {})
    made, committed = (levels(folder / "dreams" / "example_cloud.png") for folder in (main_job[0], ROOT))
    assert made.shape == committed.shape and torch.equal(made[:, :110], committed[:, :110])  # x is no model's
    lit = [(picture > 60).float().mean().item() for picture in (made, committed)]
    assert lit[0] == pytest.approx(lit[1], rel=0.2)  # another number of threads makes another model


def test_the_readme_s_lines_for_a_digit_of_your_choice_turn_the_script_into_one_that_trains(folder):
    (lines,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    *replacing, new = re.split(r"(?m)^# .*\n", lines)[1:]  # a comment above each says where it goes
    script = SCRIPT.read_text().replace("    dreams, losses", f"{new}    dreams, losses")
    olds = r"SAMPLES = 64|.*return images|.*self\.fc1 =|.*self\.fc3 =|.*return self\.decode|.*bce = ".split("|")
    for old, line in zip(olds, replacing, strict=True):
        script, count = re.subn(f"(?m)^{old}.*\n", lambda _, line=line: line, script)
        assert count == 1, old
    (folder / SCRIPT.name).write_text(script)
    result = run_small(folder, "--epochs", "1", script=folder / SCRIPT.name)
    assert result.returncode == 0 and levels(folder / "dreams" / "dream_sample.png").shape == (302, 242), result.stderr


STATE = """
import os, signal, socket
def state():
    of_process = signal.getsignal(signal.SIGINT), socket.getdefaulttimeout(), str(torch.get_default_device())
    of_cpu = (torch.full((1,), 1e-40) * torch.ones(1)).item(), torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_rng_state().tolist(), of_process, of_cpu
seed, of_process, of_cpu = before = state()
import quest_12_1 as quest
assert state() == before and of_cpu[0] > 0 and of_cpu[1] == "none"
assert not torch.cuda.is_initialized() and sorted(os.listdir()) == ["data", "dreams", "run.err", "run.out"]
learn, seen = quest.learn, []
learn(*(quest.images_on("cpu", dataset) for dataset in quest.load_data("data")), epochs=1)
assert state()[0] != seed and state()[1:] == (of_process, of_cpu)
quest.learn = lambda *given, **named: (seen.append((state()[2], given[2:], named)), learn(*given, **named))[1]
os.rename("data", "d")
sizes = dict(HIDDEN=30, LATENT_DIM=3, BETA=30, BATCH_SIZE=300, LEARNING_RATE=0.01, SAMPLES=16)
vars(quest).update(sizes, EPOCHS=1, SEED=5, DATA_DIR="d")
for rounds in (False, True):  # a processor that has instructions for bfloat16, or none
    torch.cpu.get_capabilities = lambda: {"avx512_bf16": rounds}
    assert quest.main(["--device", "cpu", "--output", "nap"]) == 0 and os.listdir("nap") == ["dream_sample.png"]
    of_cpu, job, named = seen.pop()
    assert of_cpu == (0, "bf16" if rounds else "none") and job == (1, 5)
    assert named == dict(hidden=30, latent_dim=3, beta=30, batch_size=300, lr=0.01, samples=16)
    assert state()[1:] == (of_process, (0, "none")) and torch.get_float32_matmul_precision() == "highest"
raise SystemExit
"""


def test_main_hands_on_each_setting_as_it_is_then_and_leaves_behind_the_seed_and_flushed_denormals_alone(folder):
    result = run_small(folder, "--epochs", "nonsense", prelude=STATE)
    assert result.returncode == 0 and "1 x" not in result.stdout and "+ 30 x KLD" in result.stdout, result.stderr
    assert levels(folder / "nap" / "dream_sample.png").shape == (62, 242)  # two rows of eight


def test_denormals_are_flushed_in_every_thread_that_trains(folder):
    left = """step, many = torch.optim.Adam.step, torch.full((1_000_000,), 1e-40)
torch.set_num_threads(2)
torch.optim.Adam.step = lambda self: sys.exit("some left") if (many * torch.ones(1)).any() else step(self)"""
    result = run_small(folder, "--epochs", "1", prelude="import sys\n" + left)
    assert result.returncode == 0, result.stderr
