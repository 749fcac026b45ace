"""The promises for bad days, under real faults: nothing lost or half-written, every failure one clear message."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from harness import ROOT, SCRIPT, Run, edited, prepare, put_template, run, run_small

import quest_12_1 as quest

EARLIER = b"an earlier picture"
TRAIN = Path("data/MNIST/raw/train-images-idx3-ubyte")

# Root ignores permissions, unless it gives up its capabilities, as here: 0x20080522 is the version of the call.
WITHOUT_PRIVILEGE = r"import ctypes; assert ctypes.CDLL(None).capset(b'\x22\5\x08\x20\0\0\0\0', bytes(24)) == 0"


def picture(folder, leftovers=0):
    """What dreams/ holds beside `leftovers` temporary folders: one picture, "earlier", "whole" or "broken"."""
    *parts, name = sorted(os.listdir(folder / "dreams"))
    assert [part[:6] for part in parts] == leftovers * [".part-"] and name == "dream_sample.png"
    data = (folder / "dreams" / name).read_bytes()
    whole = data.startswith(b"\x89PNG\r\n") and data.endswith(b"IEND\xaeB`\x82")
    return "earlier" if data == EARLIER else "whole" if whole else "broken"


def stopped(folder, number, moment):
    """A run with an earlier picture, which gets a real signal when it comes to calling the function `moment`."""
    (folder / "dreams").mkdir()
    (folder / "dreams" / "dream_sample.png").write_bytes(EARLIER)
    send = f"import os, torch, torchvision, PIL.Image; {moment} = lambda *_, **__: os.kill(os.getpid(), {number})"
    return run_small(folder, "--json", "--epochs", "1", prelude=send)


@pytest.mark.parametrize("moment", ["PIL.Image.Image.save", "os.replace"])
def test_a_kill_between_writing_the_picture_and_moving_it_loses_neither(folder, moment):
    assert stopped(folder, 9, moment).returncode == -9 and picture(folder, leftovers=1) == "earlier"
    assert run_small(folder, "--epochs", "1").returncode == 0 and picture(folder, leftovers=1) == "whole"


@pytest.mark.parametrize("moment", ["torchvision.transforms.ToTensor", "torch.optim.Adam.step", "PIL.Image.Image.save"])
def test_ctrl_c_ends_the_run_with_one_line_and_the_earlier_picture(folder, moment):
    result = stopped(folder, 2, moment)
    assert result.returncode == 130 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1] == "quest_12_1.py: stopped by Ctrl-C."
    assert json.loads(result.stdout) == {"success": False, "message": "stopped by Ctrl-C."}
    assert picture(folder) == "earlier"


DATA = ("/data/MNIST can be neither read nor downloaded: ", "in its clone's folder", "git checkout -- data/MNIST\n")
PAGE = ("/dreams/plane.html", "in the folder of its clone")
LABELS = TRAIN.with_name("t10k-labels-idx1-ubyte")
FAULTS = {  # what is done in a folder with data, Python to execute first, what is said
    "there is no data": (lambda: shutil.rmtree("data"), "", (*DATA, "refused")),
    "a file is missing": (TRAIN.unlink, "", (*DATA, "refused")),
    "a file is cut short": (lambda: os.truncate(TRAIN, 1_000_000), "", (*DATA, "RuntimeError")),
    "a file is empty": (lambda: os.truncate(TRAIN, 0), "", (*DATA, "ValueError")),
    "a file is of another format": (lambda: TRAIN.write_bytes(b"PK\3\4" + TRAIN.read_bytes()[4:]), "", DATA),
    "a file has a wrong count": (lambda: TRAIN.write_bytes(b"\0\0\x08\3\0\0\1\0" + TRAIN.read_bytes()[8:]), "", DATA),
    "the labels are cut short": (lambda: os.truncate(LABELS, 10), "", DATA),
    "a file cannot be read": (lambda: TRAIN.chmod(0), WITHOUT_PRIVILEGE, (*DATA, "Permission denied")),
    "the page's template is missing": (Path("dreams/plane.html").unlink, "", PAGE),
    "the folder is a file": (lambda: Path("out").touch(), "", ("'out' (--output): ", "File exists: 'out'")),
    "the folder is read-only": (lambda: os.mkdir("out", 0o555), WITHOUT_PRIVILEGE, ("Permission denied: 'out/",)),
    "the folder cannot be made": (lambda: os.chmod(".", 0o555), WITHOUT_PRIVILEGE, ("Permission denied: 'out'",)),
}


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """The working folder, which is the current one too, with a copy of MNIST, free to damage, and the template."""
    shutil.copytree(ROOT / TRAIN.parent, tmp_path / TRAIN.parent)
    put_template(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("make", "prelude", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_from_the_start_is_one_message_before_training_and_changes_nothing(own_data, make, prelude, said):
    def contents():
        files = [path for path in own_data.rglob("*") if path.is_file() and path.stem != "run"]  # which it prints
        return {path: path.read_bytes() for path in files}, os.path.isdir("out")

    make()
    before, result = contents(), run_small(own_data, "--gallery", "--output", "out", prelude=prelude)
    assert result.returncode == 1 and result.stdout == "" and all(text in result.stderr for text in said), result.stderr
    assert result.stderr.startswith("quest_12_1.py: ") and result.stderr.count("quest_12_1.py: ") == 1
    assert said not in (DATA, PAGE) or str(own_data) + said[0] in result.stderr
    assert "Traceback" not in result.stderr and contents() == before


def test_json_is_printed_also_where_standard_error_is_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        result = run(
            tmp_path, "--json", "--device", "banana", capture_output=False, stdout=subprocess.PIPE, stderr=full
        )
    assert result.returncode != 0 and "'banana'" in json.loads(result.stdout)["message"]


def test_an_empty_name_of_the_folder_is_told_by_its_option(folder):
    result = run_small(folder, "--output", "")
    assert result.returncode == 1 and result.stderr.startswith("quest_12_1.py: not all can be saved in '' (--output): ")


def test_data_that_may_only_be_read_is_enough_and_training_makes_no_network_call(own_data):
    TRAIN.chmod(0o555)
    TRAIN.parent.chmod(0o555)
    hook = "lambda event, _: event.startswith('socket.') and sys.exit('a network call')"
    forbid = f"import sys; sys.addaudithook({hook}); {WITHOUT_PRIVILEGE}\n"
    result = run_small(own_data, "--epochs", "1", "--gallery", prelude=forbid)
    assert result.returncode == 0, result.stderr
    assert "a network call" in run_small(own_data, prelude=forbid + "import socket; socket.socket()").stderr


@pytest.mark.parametrize("size", [20_000, 1_000_000, 4_000_000], ids=["for no picture", "for pictures", "for a model"])
def test_on_a_full_disk_it_is_one_message_and_the_earlier_picture_stays(tmp_path, size):
    folder, full = prepare(tmp_path, gallery=True), tmp_path / "full"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", full]  # a real file system
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        (full / "dream_sample.png").write_bytes(EARLIER)
        result = run_small(folder, "--epochs", "1", "--gallery", "--output", "full")
        assert result.returncode == 1 and "Traceback" not in result.stderr
        said = "quest_12_1.py: not all can be saved in 'full' (--output): [Errno 28] No space left on device"
        assert result.stderr.splitlines()[-1].startswith(said)
        assert [path.name for path in full.iterdir()] == ["dream_sample.png"]
        assert (full / "dream_sample.png").read_bytes() == EARLIER
    finally:
        subprocess.run(["umount", "-l", full], check=True)


def test_a_picture_that_cannot_be_replaced_is_named(tmp_path):
    folder = prepare(tmp_path, gallery=True)
    (folder / "dreams" / "dream_growth.gif").mkdir()
    result = run_small(folder, "--epochs", "1", "--gallery")
    assert result.returncode == 1 and "dreams/dream_growth.gif'" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and not list(folder.rglob(".part-*"))


def test_a_temporary_folder_that_cannot_be_removed_is_no_failure(folder):
    """As on NFS, where a file that another process holds open stays behind under another name."""
    stays = "import os\ndef rmdir(path, **_): raise OSError(39, 'Directory not empty', path)\nos.rmdir = rmdir\n"
    result = run_small(folder, "--epochs", "1", prelude=stays)
    assert result.returncode == 0 and picture(folder, leftovers=2) == "whole", result.stderr


def test_4_runs_started_at_one_moment_all_succeed(folder):
    runs = [Run(folder, "--epochs", "1", name=str(k)) for k in range(4)]
    assert [run.wait().returncode for run in runs] == [0] * 4, [run.stderr for run in runs]
    assert len({run.stdout.split("Held-out loss")[1] for run in runs}) == 1  # all trained on the same digits
    assert picture(folder) == "whole"


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "mps", "xpu", "hpu", "banana", "", "cuda:-1"])
def test_a_device_that_is_not_there_is_one_message_with_the_reason(tmp_path, monkeypatch, capsys, device):
    try:
        torch.zeros(1, device=device).item()
        pytest.skip(f"{device} is there")
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error)[:40].split("\n")[0]
    monkeypatch.chdir(tmp_path)
    assert quest.main(["--json"] if device == "cuda" else ["--json", "--device", device]) == 1  # "cuda" is the default
    out, err = capsys.readouterr()
    assert f"PyTorch cannot use the device '{device}': {reason}" in err and len(err) < 800
    assert "a CUDA GPU is required" in err and "python quest_12_1.py --device cpu" in err
    assert err == f"quest_12_1.py: {json.loads(out)['message']}\n" and out.count("\n") == 1
    assert json.loads(out)["success"] is False and list(tmp_path.iterdir()) == []


def failing(where, error, text):
    """Python that replaces an operation of PyTorch by one that raises."""
    return f"def failing(*_, **__): raise {error}({text + chr(10) + 'For debugging ...'!r})\ntorch.{where} = failing"


LITTLE_MEMORY = """import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, -1))"""
UNCHECKED = "torch.nn.functional.binary_cross_entropy = lambda x, *_, **__: x.sum() * float('nan')"  # as on ROCm, mps
FULL, LOST = "HIP out of memory. Tried to allocate 20.00 MiB.", "CUDA error: unspecified launch failure"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."
MPS = "MPS backend out of memory (MPS allocated: 8.00 GB)"
ASSERT = "CUDA error: device-side assert triggered"
BUG = "Expected all tensors to be on the same device, but got mat1 is on cpu (in method wrapper_CUDA_addmm)"
RATE = "quest_12_1.py: .*lower LEARNING_RATE"
ENDS = {  # one setting of the script, Python to execute first, the last line; it is a message, or that of a traceback
    "a full GPU": ((), failing("sigmoid", "torch.OutOfMemoryError", FULL), f"quest_12_1.py: {FULL}"),
    "a GPU full at its first product": ((), failing("sigmoid", "RuntimeError", CUBLAS), f"quest_12_1.py: {CUBLAS}"),
    "a full GPU of Apple's": ((), failing("sigmoid", "RuntimeError", MPS), f"quest_12_1.py: {re.escape(MPS)}"),
    "a lost GPU": ((), failing("sigmoid", "torch.AcceleratorError", LOST), f"quest_12_1.py: {LOST}"),
    "a loss that is NaN": (("LEARNING_RATE", "1e3"), "", RATE),
    "a loss that is NaN on ROCm or mps": ((), UNCHECKED, RATE),
    "a loss that is NaN on CUDA": ((), failing("sigmoid", "torch.AcceleratorError", ASSERT), RATE),
    "little memory": ((), LITTLE_MEMORY, "MemoryError"),
    "a data set of other arguments": (("DATASET", "datasets.SVHN"), "", "TypeError: SVHN.*"),
    "a bug that names CUDA": ((), failing("sigmoid", "RuntimeError", BUG), "For debugging ..."),
    "another bug": ((), failing("sigmoid", "KeyError", "name"), "KeyError: .*"),
}


@pytest.mark.parametrize(("setting", "prelude", "last_line"), ENDS.values(), ids=ENDS)
def test_an_error_is_told_as_what_it_is_and_a_bug_keeps_its_traceback(folder, setting, prelude, last_line):
    script = edited(folder, *setting) if setting else SCRIPT
    result = run_small(folder, "--json", script=script, prelude=prelude)
    assert result.returncode == 1 and re.fullmatch(last_line, result.stderr.splitlines()[-1]), result.stderr
    assert ("Traceback" in result.stderr) != last_line.startswith("quest") and "neither read" not in result.stderr
    assert not list(folder.glob("dreams/*"))
    if last_line.startswith("quest"):
        answer = json.loads(result.stdout, parse_constant=pytest.fail)
        assert answer == {"success": False, "message": result.stderr.splitlines()[-1].removeprefix("quest_12_1.py: ")}


def test_a_gpu_that_fails_at_its_first_use_cannot_be_used(folder):
    result = run_small(folder, prelude=failing("zeros", "torch.cuda.DeferredCudaCallError", "CUDA call failed lazily"))
    assert result.returncode == 1 and "cannot use the device 'cpu': CUDA call failed lazily\n" in result.stderr
