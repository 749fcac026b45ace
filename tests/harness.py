"""Ways to run the script as the real process it is, in folders with real data, and to count what it computes."""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import optim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import quest_12_1 as quest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "quest_12_1.py"
RAW = "data/MNIST/raw"  # in a working folder
NOBODY = "http://127.0.0.1:9"
NO_NETWORK = {"http_proxy": NOBODY, "https_proxy": NOBODY, "no_proxy": "127.0.0.1"}  # but for this machine

with warnings.catch_warnings():  # a driver that is too old warns, which would stop the collection of all tests
    warnings.simplefilter("ignore")
    GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

# Python that a process executes before the script: it trains on 2,000 digits then, 16 steps in place of 469.
SMALL = """
import torchvision
def small(self, load=torchvision.datasets.MNIST._load_data):
    data, targets = load(self)
    return (data[:2000], targets[:2000]) if self.train else (data, targets)
torchvision.datasets.MNIST._load_data = small
"""


def copy_archives(folder):
    """Make `folder` a working folder like a fresh clone's: MNIST still packed, no dream yet."""
    shutil.copytree(ROOT / RAW, folder / RAW, ignore=shutil.ignore_patterns("*-ubyte"))
    return folder


def loader_of(x):
    """Batches of x as the script makes them."""
    return DataLoader(quest.ShuffledBatches(x, quest.BATCH_SIZE), batch_size=None)


def adam_of(model):
    """The optimizer as the script makes it."""
    return optim.Adam(model.parameters(), lr=quest.LEARNING_RATE, fused=True)


class Operations(TorchDispatchMode):
    """Within the block, `calls` collects what PyTorch dispatches: pairs of an operation's name and its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.calls.append((operation.__name__.split(".")[0], arguments))
        return operation(*arguments, **(named or {}))


def operations_of_a_step(device):
    """The names of the operations that compute in one training step: an epoch of three batches less one of two."""
    free = {"view", "t", "expand", "detach", "empty", "_record_function_enter_new", "_record_function_exit"}
    model, x = quest.VAE().to(device), torch.rand(3 * quest.BATCH_SIZE, quest.PIXELS, device=device)
    optimizer, names = adam_of(model), []
    for batches in (1, 2, 3):  # the first prepares Adam
        with Operations() as operations:
            quest.train_epoch(model, optimizer, loader_of(x[: batches * quest.BATCH_SIZE]), "")
        names.append([name for name, _ in operations.calls if name not in free])
    _, two, step = names
    for name in [*two, "index"]:  # `index` fetches the batch, before the step
        step.remove(name)
    return step


def run(folder, *arguments, **environment):
    """Run the script in a fresh interpreter in `folder`, to its end."""
    command, env = [sys.executable, str(SCRIPT), *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def child(folder, name, script, arguments, prelude, environment):
    """What a forked process does: the script as __main__, from its first line to its exit, with real signals."""
    os.chdir(folder)
    for descriptor, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.environ.update(environment)
    sys.argv = [str(script), "--device", "cpu", *arguments]
    exec(SMALL + prelude, {})
    runpy.run_path(sys.argv[0], run_name="__main__")


class Run:
    """The script running on a small training set, in a process forked from one that has done the imports: saves 3 s.

    `prelude` is Python that the process executes first.
    """

    FORKS = multiprocessing.get_context("forkserver")
    FORKS.set_forkserver_preload(["torchvision", "torch.utils.data", "torch.optim", "tqdm"])

    def __init__(self, folder, *arguments, name="run", script=SCRIPT, prelude="", **environment):
        self.out_file, self.err_file = (folder / f"{name}.{end}" for end in ("out", "err"))
        self.err_file.write_text("")
        settings = (folder, name, script, arguments, prelude, environment)
        self.process = self.FORKS.Process(target=child, args=settings)
        self.process.start()

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.kill(self.process.pid, number)

    def ends_within(self, seconds):
        """Wait for the process's end, but no longer than `seconds`; say whether it came."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def says(self, text):
        """Wait until standard error holds `text`."""
        deadline = time.monotonic() + 60
        while text not in self.err_file.read_text():
            assert time.monotonic() < deadline, f"never said {text!r}: {self.err_file.read_text()}"
            time.sleep(0.005)

    def wait(self):
        """Wait for the end; afterwards returncode is negative for the signal that killed it, as in subprocess."""
        assert self.ends_within(300), "never ended"
        self.returncode, self.stdout = self.process.exitcode, self.out_file.read_text()
        self.stderr = self.err_file.read_text()
        return self


def run_small(folder, *arguments, **settings):
    """Run the script on a small training set, to its end."""
    return Run(folder, *arguments, **settings).wait()


def only_message(result):
    """Assert that a failed run printed one message on standard error and nothing else; return it."""
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("quest_12_1.py: ") and result.stderr.count("quest_12_1.py: ") == 1
    return result.stderr
