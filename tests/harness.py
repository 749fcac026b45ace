"""Ways to run the script as the real process it is, in folders with real data, and to count what it computes."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import optim
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import quest_12_1 as quest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "quest_12_1.py"
NO_BAR = tqdm(disable=True)
with warnings.catch_warnings():  # a driver that is too old warns, which would stop the collection of all tests
    warnings.simplefilter("ignore")
    GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

# Python that a process executes first: the script has only 2,000 digits of each set then, 16 steps in place of 469.
SMALL = """
import torch, torchvision
torch.set_num_threads(1)  # many of these may run at once
def small(self, load=torchvision.datasets.MNIST._load_data):
    return [part[:2000] for part in load(self)]  # images and labels
torchvision.datasets.MNIST._load_data = small
"""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torchvision", "torch.utils.data", "torch.optim", "tqdm"])


def run(folder, *arguments):
    """Run the script in a fresh interpreter in `folder`, to its end."""
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def child(folder, name, script, arguments, prelude):
    """What a forked process does: the Python `prelude`, then the script as __main__, from first line to exit."""
    os.chdir(folder)
    for descriptor, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.environ |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    sys.argv = [str(script), "--device", "cpu", *arguments]
    exec(SMALL + prelude, {})
    runpy.run_path(sys.argv[0], run_name="__main__")


class Run:  # the script on few digits, in a process forked from one that has done the imports, without a network
    def __init__(self, folder, *arguments, name="run", script=SCRIPT, prelude=""):
        self.printed = folder / f"{name}.out", folder / f"{name}.err"
        self.process = FORKS.Process(target=child, args=(folder, name, script, arguments, prelude))
        self.process.start()

    def wait(self):
        """Wait for the end; afterwards returncode is negative for the signal that killed it, as in subprocess."""
        self.process.join(300)
        self.returncode = self.process.exitcode
        self.stdout, self.stderr = (file.read_text() for file in self.printed)
        return self


def run_small(folder, *arguments, **settings):
    return Run(folder, *arguments, **settings).wait()


def levels(path, mode="L", frame=0):
    """A picture's pixels, from 0 to 255: (height, width), or (height, width, 3)."""
    with Image.open(path) as image:
        image.seek(frame)
        return torch.tensor(list(image.convert(mode).tobytes())).view(*image.size[::-1], -1).squeeze(-1)


def adam_of(model):
    return optim.Adam(model.parameters(), lr=quest.LEARNING_RATE, fused=True)  # as the script makes it


def operations_of_a_step(device):
    """How many operations one training step computes: those of an epoch of two steps, less those of one of one."""
    free = {"view", "t", "expand", "detach", "empty", "_record_function_enter_new", "_record_function_exit"}
    model, names, counts = quest.VAE().to(device), [], []
    optimizer, x = adam_of(model), torch.rand(quest.BATCH_SIZE, quest.PIXELS, device=device)

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            names.append(operation.__name__.split(".")[0])
            return operation(*arguments, **(named or {}))

    for batches in ([x], [x], [x, x]):  # the first prepares Adam
        names.clear()
        with Operations():
            quest.train_epoch(model, optimizer, batches, NO_BAR)
        counts.append(sum(name not in free for name in names))
    return counts[2] - counts[1]
