"""The promises for bad days, under real faults: nothing lost or half-written, every failure one clear message."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from harness import ROOT, Run, run_small

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


CURE = ("./data", "git checkout -- data", "/data/MNIST and run again")
FAULTS = {  # what is done in a folder with data, Python to execute first, what is said
    "there is no data": (lambda: shutil.rmtree("data"), "", (*CURE, "refused")),
    "a file is missing": (TRAIN.unlink, "", (*CURE, "refused")),
    "a file is cut short": (lambda: os.truncate(TRAIN, 1_000_000), "", CURE),
    "a file is empty": (lambda: os.truncate(TRAIN, 0), "", CURE),
    "a file is of another format": (lambda: TRAIN.write_bytes(b"PK\3\4" + TRAIN.read_bytes()[4:]), "", CURE),
    "a file has a wrong count": (lambda: TRAIN.write_bytes(b"\0\0\x08\3\0\0\1\0" + TRAIN.read_bytes()[8:]), "", CURE),
    "the labels are cut short": (lambda: os.truncate(TRAIN.with_name("t10k-labels-idx1-ubyte"), 10), "", CURE),
    "a file cannot be read": (lambda: TRAIN.chmod(0), WITHOUT_PRIVILEGE, (*CURE, "Permission denied")),
    "dreams is a file": (lambda: Path("dreams").touch(), "", ("File exists: 'dreams'",)),
    "dreams is read-only": (lambda: os.mkdir("dreams", 0o555), WITHOUT_PRIVILEGE, ("Permission denied: 'dreams/",)),
    "dreams cannot be made": (lambda: os.chmod(".", 0o555), WITHOUT_PRIVILEGE, ("Permission denied: 'dreams'",)),
}


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """The working folder, which is the current one too, with a copy of MNIST, free to damage."""
    shutil.copytree(ROOT / TRAIN.parent, tmp_path / TRAIN.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("make", "prelude", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_from_the_start_is_one_message_before_training_and_changes_nothing(own_data, make, prelude, said):
    def contents():
        files = [path for path in own_data.rglob("*") if path.is_file() and path.stem != "run"]  # which it prints
        return {path: path.read_bytes() for path in files}, os.path.isdir("dreams")

    make()
    before, result = contents(), run_small(own_data, "--epochs", "1", prelude=prelude)
    assert result.returncode == 1 and result.stdout == "" and all(text in result.stderr for text in said), result.stderr
    assert result.stderr.startswith("quest_12_1.py: ") and result.stderr.count("quest_12_1.py: ") == 1
    assert "Traceback" not in result.stderr and contents() == before


def test_data_that_may_only_be_read_is_enough_and_training_makes_no_network_call(own_data):
    TRAIN.chmod(0o555)
    TRAIN.parent.chmod(0o555)
    hook = "lambda event, _: event.startswith('socket.') and sys.exit('a network call')"
    forbid = f"import sys; sys.addaudithook({hook}); {WITHOUT_PRIVILEGE}\n"
    result = run_small(own_data, "--epochs", "1", "--gallery", prelude=forbid)
    assert result.returncode == 0, result.stderr
    assert "a network call" in run_small(own_data, prelude=forbid + "import socket; socket.socket()").stderr


@pytest.mark.parametrize("size", [20_000, 1_000_000, 4_000_000], ids=["for no picture", "for pictures", "for a model"])
def test_on_a_full_disk_it_is_one_message_and_the_earlier_picture_stays(folder, size):
    dreams = folder / "dreams"
    dreams.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", dreams]  # a real file system
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        (dreams / "dream_sample.png").write_bytes(EARLIER)
        result = run_small(folder, "--epochs", "1", "--gallery")
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith("quest_12_1.py: [Errno 28] No space left on device")
        assert picture(folder) == "earlier"
    finally:
        subprocess.run(["umount", "-l", dreams], check=True)


def test_a_picture_that_cannot_be_replaced_is_named(folder):
    (folder / "dreams" / "dream_growth.gif").mkdir(parents=True)
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


CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."
LAZY = "CUDA call failed lazily at initialization"
BUG = "Expected all tensors to be on the same device, but got mat1 is on cpu (in method wrapper_CUDA_addmm)"


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 20.00 MiB.", CUBLAS, LAZY, BUG])
def test_a_gpu_that_fails_is_one_message_by_its_first_line_but_a_bug_keeps_its_traceback(folder, text):
    where, error = ("zeros", "torch.cuda.DeferredCudaCallError") if text == LAZY else ("sigmoid", "RuntimeError")
    failing = f"import torch\ndef failing(*_, **__): raise {error}({text!r} + '\\nFor debugging ...')\n"
    result = run_small(folder, prelude=f"{failing}torch.{where} = failing")
    assert result.returncode == 1
    if text == BUG:
        assert "Traceback" in result.stderr and "in decode" in result.stderr
    else:
        assert result.stderr.count("quest_12_1.py: ") == 1 and f": {text}\n" in result.stderr
        assert "For debugging" not in result.stderr and "Traceback" not in result.stderr
