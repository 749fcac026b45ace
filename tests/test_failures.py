"""What can go wrong with the script, what is said then, what is kept."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import faults
import pytest
import torch
from harness import (
    SMALL,
    TIME_LIMIT,
    expect_no_black_picture,
    expect_old_or_new,
    expect_one_message,
    expect_same_files,
    expect_signal,
    expect_success,
    files_in,
    run_script,
)

import quest_12_1 as quest

SAVED = ["dream_model.pt", "dream_sample.png"]
EARLIER = b"an earlier run's"
ONE_EPOCH = ["--device", "cpu", "--epochs", "1"]


@pytest.fixture
def earlier(folder):
    """The clone of `folder`, with an earlier run's picture and model in it."""
    for name in SAVED:
        (folder / "dreams" / name).write_bytes(EARLIER)
    return folder


def leftovers(folder):
    """The temporary folders that a run has left anywhere in its clone."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".part-*")]


def expect_untouched(folder):
    """Expect the earlier run's picture and model to be whole."""
    for name in SAVED:
        same = (folder / "dreams" / name).read_bytes() == EARLIER
        assert same, f"{name} is no longer the earlier one"


# ---- A run is killed, or several start at once ---------------------------------------
# When the run is killed, how many of the two files are in their place by then, and
# what it has not done if it ends well.
KILLS = {
    "while it writes": (faults.killed_in_writing, 0, "no large file was written"),
    "before the moves": (
        partial(faults.killed_at_move, 1),
        0,
        "no file was moved into place",
    ),
    "between the moves": (
        partial(faults.killed_at_move, 2),
        1,
        "no second file was moved into place",
    ),
}


@pytest.mark.parametrize(("kill", "moved", "missed"), KILLS.values(), ids=KILLS)
def test_a_killed_run_leaves_whole_files_and_at_most_a_hidden_folder(
    earlier, small_run, kill, moved, missed
):
    old = files_in(earlier)
    saved = files_in(small_run.output)

    result = run_script(earlier, *SMALL, fault=kill)

    expect_signal(result, signal.SIGKILL, missed)
    new = old | {f"dreams/{name}": saved[name] for name in SAVED}
    expect_old_or_new(files_in(earlier), old, new, moved)


def test_the_next_run_after_a_kill_saves_both_files(earlier, small_run):
    kill, _, missed = KILLS["between the moves"]
    expect_signal(run_script(earlier, *SMALL, fault=kill), signal.SIGKILL, missed)

    result = run_script(earlier, *SMALL)

    expect_success(result)
    for name in SAVED:
        data = (earlier / "dreams" / name).read_bytes()
        same = data == (small_run.output / name).read_bytes()
        assert same, f"{name} is not what the same run saves without a kill before"


def test_runs_that_start_at_one_moment_all_succeed(folder):
    options = ["--epochs", "1", "--json"]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: run_script(folder, *options), range(3)))

    for result in runs:
        expect_success(result)
    first, *others = [json.loads(result.stdout)["losses"] for result in runs]
    for losses in others:
        assert losses == first, "runs of the same seed have learned otherwise"
    expect_no_black_picture(folder / "dreams" / "dream_sample.png")
    assert leftovers(folder) == []


# ---- Ctrl-C --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "moment",
    [
        faults.ctrl_c_before_training,
        faults.ctrl_c_in_training,
        faults.ctrl_c_in_saving,
    ],
)
def test_ctrl_c_is_one_line_and_keeps_the_earlier_files(earlier, moment):
    result = run_script(earlier, "--epochs", "1", fault=moment)

    expect_signal(result, signal.SIGINT)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "quest_12_1.py: stopped by Ctrl-C."
    expect_untouched(earlier)
    assert leftovers(earlier) == []


def test_main_lets_ctrl_c_through_so_that_a_notebook_stops(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quest, "learn", interrupted)

    with pytest.raises(KeyboardInterrupt):
        quest.main(ONE_EPOCH)


SHELL = """
import pty, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # also under nohup, which ignores it
pty.spawn(["bash", "--norc", "--noprofile", "-i"])
"""


class Terminal:
    """A shell on a pseudo-terminal, in `folder`: what is typed, and what it shows.

    Only on a terminal does Ctrl-C, typed, become a SIGINT to the program that runs. A
    Python process (SHELL) holds the terminal's other end; it is typed to through a pipe.
    """

    def __init__(self, folder):
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHELL],
            cwd=folder,
            env=os.environ | {"PS1": "$ "},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()  # whatever still runs on the terminal is hung up
        self.process.communicate()

    def type(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait_for(self, pattern):
        """Wait until what it shows from now on matches a regular expression."""
        seen = len(self.shown)
        end = time.monotonic() + TIME_LIMIT
        while not re.search(pattern, self.shown[seen:]):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[seen:]!r}"
            if select.select([self.process.stdout], [], [], 1)[0]:
                data = os.read(self.process.stdout.fileno(), 4096)
                assert data, f"the shell ended without {pattern!r}: {self.shown!r}"
                self.shown += data.decode(errors="replace")


CTRL_C = "\x03"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_one_ctrl_c_ends_a_shell_s_loop_of_runs(folder):
    run = f"{sys.executable} quest_12_1.py --device cpu --epochs 10000 --seed $s"
    with Terminal(folder) as terminal:
        terminal.type(f"for s in 0 1 2; do echo run-$s; {run}; done\n")
        terminal.wait_for("Epoch 2/")

        terminal.type(CTRL_C)
        # The shell's prompt, or the loop's next run; what was typed has run-$s.
        terminal.wait_for(r"\$ |run-1\r")
        went_on = "run-1\r" in terminal.shown
        assert not went_on, f"Ctrl-C did not end the loop: {terminal.shown[-500:]!r}"

        terminal.type("echo status-$?\n")
        terminal.wait_for(r"status-\d+\r")

    status = re.search(r"status-(\d+)\r", terminal.shown)[1]
    assert status == "130", f"expected the status 130, 128 + SIGINT, not {status}"
    assert terminal.shown.count("stopped by Ctrl-C.") == 1
    assert "Traceback" not in terminal.shown


# ---- The data ------------------------------------------------------------------------
def remove_all(raw):
    shutil.rmtree(raw)


def remove_one(raw):
    (raw / "train-images-idx3-ubyte").unlink()


def cut_short(raw):
    os.truncate(raw / "train-images-idx3-ubyte", 100_000)


def empty(raw):
    os.truncate(raw / "train-images-idx3-ubyte", 0)


def cut_labels_short(raw):
    os.truncate(raw / "t10k-labels-idx1-ubyte", 10)


def of_another_format(raw):
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(b"PK\3\4" + path.read_bytes()[4:])


@pytest.mark.parametrize(
    "damage",
    [remove_all, remove_one, cut_short, empty, cut_labels_short, of_another_format],
)
def test_damaged_data_are_one_message_with_folder_and_cure(own_data, call, damage):
    damage(own_data)

    result = call(quest.main, *ONE_EPOCH, "--json")

    message = expect_one_message(
        result,
        f"{own_data.parent} can be neither read nor downloaded",
        "git checkout -- data/MNIST",
    )
    answer = json.loads(result.stdout)
    assert answer == {"success": False, "message": message}
    assert not os.path.exists("dreams/dream_sample.png")


def test_what_is_missing_is_asked_for_in_the_network(own_data, call):
    remove_one(own_data)

    message = expect_one_message(call(quest.main, *ONE_EPOCH))

    # By the proxy of conftest.py.
    assert "refused" in message, f"no download was tried: {message}"


def test_another_data_set_that_is_missing_is_told_by_its_own_folder(own_data, call):
    missing = own_data.parents[1] / "FashionMNIST"

    result = call(quest.main, *ONE_EPOCH, "--dataset", "FashionMNIST")

    expect_one_message(result, f"{missing} can be neither read nor downloaded")


def data_files():
    return sorted(Path("data/MNIST/raw").iterdir())


def damaged_heads(path):
    """Yield what a file would hold with one byte of its head changed, and which it is.

    The heads are 16 bytes before images, 8 before labels.
    """
    data = path.read_bytes()
    for place in range(16 if "images" in path.name else 8):
        for value in {0, 1, 255, data[place] ^ 1, data[place] ^ 128}:
            changed = bytearray(data)
            changed[place] = value
            what = f"{path.name}, byte {place}, {data[place]} changed to {value}"
            yield bytes(changed), what


def test_any_changed_byte_of_a_file_s_head_is_one_message_or_harmless(own_data):
    whole = contents_of(quest.open_data("MNIST"))
    for path in data_files():
        data = path.read_bytes()
        for changed, what in damaged_heads(path):
            path.write_bytes(changed)
            try:
                opened = contents_of(quest.open_data("MNIST"))
            except quest.JobError as error:
                assert "neither read nor downloaded" in str(error), what
            else:
                for got, expected in zip(opened, whole, strict=True):
                    same = torch.equal(got, expected)
                    assert same, f"{what}: other data were taken for the file's"
        path.write_bytes(data)


def contents_of(loaded):
    """Images and labels of the two data sets that `open_data` returns."""
    return [part for data in loaded for part in (data.data, data.targets)]


def test_read_only_data_are_enough_and_training_makes_no_network_call(folder, own_data):
    for path in data_files():
        path.chmod(0o444)
    own_data.chmod(0o555)

    result = run_script(folder, "--epochs", "1", fault=faults.read_only_and_no_network)

    expect_success(result)


def test_data_that_may_not_be_read_are_one_message(folder, own_data):
    (own_data / "train-images-idx3-ubyte").chmod(0)

    result = run_script(folder, fault=faults.give_up_privileges)

    expect_one_message(result, "neither read nor downloaded", "Permission denied")


# ---- The folder for what is saved ----------------------------------------------------
def a_file_in_its_place():
    Path("out").touch()


def a_folder_that_is_read_only():
    Path("out").mkdir(0o555)


def a_parent_that_is_read_only():
    os.chmod(".", 0o555)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (a_file_in_its_place, "File exists"),
        (a_folder_that_is_read_only, "Permission denied"),
        (a_parent_that_is_read_only, "Permission denied"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_before_training(
    folder, prepare, reason
):
    prepare()
    before = files_in(folder)

    result = run_script(folder, "--output", "out", fault=faults.give_up_privileges)

    expect_one_message(result, "cannot save", reason, "out")
    assert "Epoch" not in result.stderr, "it was told after training"
    expect_same_files(folder, before)


@pytest.fixture
def other_disk():
    """A folder on another file system than that of temporary files."""
    temporary = os.stat(tempfile.gettempdir()).st_dev
    for place in ("/dev/shm", "/var/tmp"):
        if os.access(place, os.W_OK) and os.stat(place).st_dev != temporary:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                yield Path(folder)
            return
    pytest.skip("/dev/shm and /var/tmp are on the file system of temporary files")


def test_a_folder_on_another_disk_than_temporary_files_is_written(
    folder, call, other_disk
):
    """No file can be moved from one file system to another in one go."""
    result = call(quest.main, *ONE_EPOCH, "--output", str(other_disk / "out"))

    expect_success(result)
    assert files_in(other_disk / "out").keys() == {"dream_sample.png", "dream_model.pt"}


def test_a_folder_without_a_name_is_one_message(folder, call):
    expect_one_message(call(quest.main, *ONE_EPOCH, "--output", ""), "cannot save")


def test_a_file_that_cannot_be_replaced_is_one_message(folder, call):
    (folder / "out" / "dream_sample.png").mkdir(parents=True)

    result = call(quest.main, *ONE_EPOCH, "--output", "out")

    expect_one_message(result, "cannot save", "out/dream_sample.png")
    assert leftovers(folder) == []


@pytest.mark.parametrize("name", SAVED)
def test_a_full_disk_is_one_message_at_whatever_file_it_is(earlier, small_run, name):
    """Full at the file's last byte."""
    size = (small_run.output / name).stat().st_size
    full = partial(faults.no_room_beyond, size - 1)

    result = run_script(earlier, *SMALL, fault=full)

    expect_one_message(result, "cannot save", "File too large")
    expect_untouched(earlier)
    assert leftovers(earlier) == []


# ---- The device ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--device", "cuda:7"],
        ["--device", "cuda:-1"],
        ["--device", "meta"],
        ["--device", "mps"],
        ["--device", "xpu"],
        ["--device", "hpu"],
        ["--device", "banana"],
        ["--device", ""],
    ],
    ids=lambda arguments: "".join(arguments[1:]) if arguments else "by default",
)
def test_a_device_that_is_not_there_is_one_message_with_the_reason(
    tmp_path, monkeypatch, call, arguments
):
    """Even without data, and nothing is written."""
    device = arguments[1] if arguments else "cuda"
    reason = why_not_there(device)
    monkeypatch.chdir(tmp_path)

    result = call(quest.main, "--json", *arguments)

    message = expect_one_message(
        result, f"device '{device}'", reason, "CUDA GPU is required", "--device cpu"
    )
    assert json.loads(result.stdout) == {"success": False, "message": message}
    expect_same_files(tmp_path, {})


def why_not_there(device):
    """How PyTorch's own error about a device begins. Skips the test if it is there."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        return str(error)[:40].partition("\n")[0]  # the script, too, cuts long lines
    pytest.skip(f"{device} is there")


# ---- In the middle of training -------------------------------------------------------
def failing(error):
    """A function that raises `error`, whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


# HIP is what PyTorch says in place of CUDA on AMD's GPUs: such an error has to be known
# by its class. Only a plain RuntimeError is known by its text.
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("HIP out of memory. Tried to allocate 20 MiB.\nMORE"),
        torch.AcceleratorError("HIP error: unspecified launch failure\nMORE"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ...\nMORE"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)\nMORE"),
    ],
    ids=["full", "lost", "full at its first product", "full, Apple's"],
)
@pytest.mark.parametrize("where", ["images_on", "train_step", "dream"])
def test_a_gpu_that_is_full_or_lost_is_one_message(
    earlier, monkeypatch, call, error, where
):
    monkeypatch.setattr(quest, where, failing(error))

    result = call(quest.main, *ONE_EPOCH, "--json")

    message = expect_one_message(result, str(error).partition("\n")[0])
    assert "MORE" not in message, f"more than PyTorch's first line: {message}"
    assert json.loads(result.stdout) == {"success": False, "message": message}
    expect_untouched(earlier)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Expected all tensors to be on the same device, but got CUDA ..."),
        RuntimeError("this step cannot be recorded: it may wait for the GPU ..."),
        # The CPU's memory is full, of which PyTorch tells by itself.
        RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        KeyError("name"),
        ValueError("a bug"),
        OSError("a bug, not a disk"),  # a message only where files are read or saved
        TypeError("a bug"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["images_on", "train_step", "dream"])
def test_any_other_error_keeps_its_traceback(earlier, monkeypatch, error, where):
    monkeypatch.setattr(quest, where, failing(error))

    with pytest.raises(type(error)) as caught:
        quest.main(ONE_EPOCH)

    assert caught.value is error
    expect_untouched(earlier)


def test_a_rate_that_is_too_high_is_one_message(earlier):
    """In a process, since a failed check of PyTorch's can end one."""
    result = run_script(earlier, "--epochs", "2", "--json", "--learning-rate", "1e20")

    message = expect_one_message(result, "lower the learning rate, 1e+20")
    # NaN and Infinity, which Python takes, are not JSON.
    answer = json.loads(result.stdout, parse_constant=pytest.fail)
    assert answer == {"success": False, "message": message}
    expect_untouched(earlier)
