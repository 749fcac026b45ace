"""The promises for bad days, under real faults: nothing lost or half-written, every failure one clear message."""

import ast
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import ROOT, SCRIPT, edited, run_small

import quest_12_1 as quest

EARLIER = b"an earlier picture"
PAGE = Path("dreams/plane.html")
TRAIN = Path("data/MNIST/raw/train-images-idx3-ubyte")

# Root ignores permissions, unless it gives up its capabilities, as here: 0x20080522 is the version of the call.
WITHOUT_PRIVILEGE = r"import ctypes; assert ctypes.CDLL(None).capset(b'\x22\5\x08\x20\0\0\0\0', bytes(24)) == 0"


def picture(folder, leftovers=0):
    """What dreams/ holds beside the template and `leftovers` temporary folders: "earlier", "whole" or "broken"."""
    *parts, name, _ = sorted(os.listdir(folder / "dreams"))
    assert [part[:6] for part in parts] == leftovers * [".part-"] and name == "dream_sample.png"
    data = (folder / "dreams" / name).read_bytes()
    whole = data.startswith(b"\x89PNG\r\n") and data.endswith(b"IEND\xaeB`\x82")
    return "earlier" if data == EARLIER else "whole" if whole else "broken"


def signal(number, moment):
    """Python after which the process gets a real signal when it comes to calling the function `moment`."""
    heard = "import signal; signal.signal(2, signal.default_int_handler)"  # also under nohup, which ignores Ctrl-C
    return f"import os, PIL.Image; {heard}; {moment} = lambda *_, **__: os.kill(os.getpid(), {number})"


@pytest.mark.parametrize("moment", ["PIL.Image.Image.save", "os.replace"])
def test_a_kill_between_writing_the_picture_and_moving_it_loses_neither(folder, moment):
    (folder / "dreams" / "dream_sample.png").write_bytes(EARLIER)
    assert run_small(folder, "--epochs", "1", prelude=signal(9, moment)).returncode == -9
    assert picture(folder, leftovers=1) == "earlier"
    assert run_small(folder, "--epochs", "1").returncode == 0 and picture(folder, leftovers=1) == "whole"


DATA = ("/data/MNIST can be neither read nor downloaded. ", "in its clone's folder", "git checkout -- data/MNIST. ")
FAULTS = {  # what is done in a folder with data, Python to execute first, what is said
    "there is no data": (lambda: shutil.rmtree("data"), "", (*DATA, "refused")),
    "a file is missing": (TRAIN.unlink, "", (*DATA, "refused")),
    "a file is cut short": (lambda: os.truncate(TRAIN, 1_000_000), "", (*DATA, "RuntimeError")),
    "a file is empty": (lambda: os.truncate(TRAIN, 0), "", (*DATA, "ValueError")),
    "a file is of another format": (lambda: TRAIN.write_bytes(b"PK\3\4" + TRAIN.read_bytes()[4:]), "", DATA),
    "the labels are cut short": (lambda: os.truncate(TRAIN.with_name("t10k-labels-idx1-ubyte"), 10), "", DATA),
    "a file cannot be read": (lambda: TRAIN.chmod(0), WITHOUT_PRIVILEGE, (*DATA, "Permission denied")),
    "the page's template is missing": (PAGE.unlink, "", ("/dreams/plane.html", DATA[1])),
    "the template is another file": (lambda: PAGE.write_text("<html>"), "", ("/dreams/plane.html", DATA[1])),
    "the folder is a file": (lambda: Path("out").touch(), "", ("File exists: 'out'",)),
    "the folder is read-only": (lambda: os.mkdir("out", 0o555), WITHOUT_PRIVILEGE, ("Permission denied: 'out/",)),
    "the folder cannot be made": (lambda: os.chmod(".", 0o555), WITHOUT_PRIVILEGE, ("Permission denied: 'out'",)),
}


@pytest.fixture
def own_data(folder, monkeypatch):
    """The working folder, which is the current one too, with a copy of MNIST, free to damage."""
    (folder / "data").unlink()
    shutil.copytree(ROOT / TRAIN.parent, folder / TRAIN.parent)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("make", "prelude", "said"), FAULTS.values(), ids=FAULTS)
def test_a_fault_from_the_start_is_one_message_before_training_and_changes_nothing(own_data, make, prelude, said):
    def contents():
        files = [path for path in own_data.rglob("*") if path.is_file() and path.stem != "run"]  # which it prints
        return {path: path.read_bytes() for path in files}, os.path.isdir("out")

    make()
    before, result = contents(), run_small(own_data, "--gallery", "--output", "out", prelude=prelude)
    assert result.returncode == 1 and result.stdout == "" and all(text in result.stderr for text in said), result.stderr
    assert result.stderr.startswith("quest_12_1.py: ") and result.stderr.count("quest_12_1.py: ") == 1
    assert said[0][0] != "/" or str(own_data) + said[0] in result.stderr
    assert "Traceback" not in result.stderr and contents() == before


def test_a_line_of_json_is_one_write_as_jobs_that_append_to_a_file_need_also_where_standard_error_is_full(folder):
    written = """import os, sys; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)
class Out:
    write = staticmethod(lambda text: os.write(1, f"{text!r}\\n".encode()) and len(text))
    flush = staticmethod(lambda: None)
sys.stdout = Out"""
    result = run_small(folder, "--json", "--device", "banana", prelude=written)
    (line,) = map(ast.literal_eval, result.stdout.splitlines())
    assert result.returncode != 0 and line.endswith("}\n") and "'banana'" in json.loads(line)["message"]


def test_data_that_may_only_be_read_is_enough_and_training_makes_no_network_call(own_data):
    TRAIN.chmod(0o555)
    TRAIN.parent.chmod(0o555)
    hook = "lambda event, _: event.startswith('socket.') and sys.exit('a network call')"
    forbid = f"import sys; sys.addaudithook({hook}); {WITHOUT_PRIVILEGE}\n"
    assert run_small(own_data, "--epochs", "1", "--gallery", prelude=forbid).returncode == 0
    assert "a network call" in run_small(own_data, prelude=forbid + "import socket; socket.socket()").stderr


def test_4_runs_started_at_one_moment_all_succeed(folder):
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda name: run_small(folder, "--epochs", "1", name=name), "0123"))
    assert [run.returncode for run in runs] == [0] * 4, [run.stderr for run in runs]
    assert picture(folder) == "whole" and len({run.stdout.split("Held-out loss")[1] for run in runs}) == 1


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


def raised(error, text, where="sigmoid", last_line="quest_12_1.py: {}"):
    """A row of ENDS: an operation of PyTorch raises an error of several lines; the first ends the message."""
    raises = f"def failing(*_, **__): raise {error}({text + chr(10) + 'For debugging ...'!r})\ntorch.{where} = failing"
    return (), raises, last_line.format(re.escape(text))


LIMIT = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, -1)); sys.argv.append('--gallery')"
BCE = "torch.nn.functional.binary_cross_entropy = lambda x, *a, **k: x.sum() + float('{}' if x.requires_grad else '{}')"
TAKEN = "import os, sys; os.makedirs('out/dream_sample.png'); sys.argv += ['--output', 'out']"
BUG = "Expected all tensors to be on the same device, but got mat1 is on cpu (in method wrapper_CUDA_addmm)"
CTRL_C, RATE = "quest_12_1.py: stopped by Ctrl-C.", "quest_12_1.py: loss .*, held-out .*: lower LEARNING_RATE"
FULL = "HIP out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.98 GiB of which 12 MB is free."
NORMALIZE = "from torchvision.transforms import ToTensor as T; f = T.__call__; T.__call__ = lambda *x: f(*x) - 0.1"
ENDS = {  # one setting of the script, Python to execute first, the last line; it is a message, or that of a traceback
    "a full GPU": raised("torch.OutOfMemoryError", FULL),
    "a GPU full at its first product": raised("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."),
    "a full GPU of Apple's": raised("RuntimeError", "MPS backend out of memory (MPS allocated: 8.00 GB)"),
    "a lost GPU": raised("torch.AcceleratorError", "HIP error: unspecified launch failure"),
    "a GPU that fails at once": raised("torch.cuda.DeferredCudaCallError", "failed", "zeros", "quest.*required.*{}"),
    "a loss that is NaN": (("LEARNING_RATE", "1e3"), "", RATE),
    "a loss that is infinite, then NaN": (("LEARNING_RATE", "3"), "", RATE),
    "a training loss alone that is NaN": ((), BCE.format("nan", 0), RATE),
    "a held-out loss alone that is infinite": ((), BCE.format(0, "inf"), RATE),
    "images that are not in [0, 1]": ((), NORMALIZE, "RuntimeError: all elements of target should be between 0 and 1"),
    "Ctrl-C before training": ((), signal(2, "torchvision.transforms.ToTensor"), CTRL_C),
    "Ctrl-C in training": ((), signal(2, "torch.optim.Adam.step"), CTRL_C),
    "Ctrl-C in saving": ((), signal(2, "PIL.Image.Image.save"), CTRL_C),
    "a folder without a name": ((), "import sys; sys.argv += ['--output', '']", "quest_12_1.py: .* directory: ''"),
    "a picture that cannot be replaced": ((), TAKEN, "quest_12_1.py: .* -> 'out/dream_sample.png'"),
    "no room for a picture": ((), LIMIT.format(20_000), "quest_12_1.py: .*File too large"),
    "no room for the page": ((), LIMIT.format(3_000_000), "quest_12_1.py: .*File too large"),
    "a data set of other arguments": (("DATASET", "datasets.SVHN"), "", "TypeError: SVHN.*"),
    "a bug that names CUDA": raised("RuntimeError", BUG, last_line="For debugging ..."),
    "another bug": raised("KeyError", "name", last_line="KeyError: .*"),
}


@pytest.mark.parametrize(("setting", "prelude", "last_line"), ENDS.values(), ids=ENDS)
def test_an_error_is_told_as_what_it_is_and_a_bug_keeps_its_traceback(folder, setting, prelude, last_line):
    (folder / "dreams" / "dream_sample.png").write_bytes(EARLIER)
    script = edited(folder, *setting) if setting else SCRIPT
    result = run_small(folder, "--json", "--epochs", "1", script=script, prelude=prelude)
    _, said, message = result.stderr.partition("quest_12_1.py: ")
    assert re.fullmatch(last_line, result.stderr.splitlines()[-1]), result.stderr
    assert result.returncode == (130 if last_line == CTRL_C else 1)
    assert ("Traceback" in result.stderr) != bool(said) and "neither read" not in result.stderr
    assert picture(folder) == "earlier" and not list(folder.rglob(".part-*"))
    told = {"success": False, "message": message.strip()}
    assert not said or json.loads(result.stdout, parse_constant=pytest.fail) == told
