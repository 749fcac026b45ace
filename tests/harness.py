"""Ways to run the script as the real process it is, in folders with real data, and to read what it saves."""

import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, TEMPLATE = ROOT / "quest_12_1.py", ROOT / "dreams" / "plane.html"
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


def prepare(folder):
    """Give the folder what a run needs besides the script: MNIST, which all share, and the gallery's template."""
    (folder / "data").symlink_to(ROOT / "data")
    (folder / "dreams").mkdir()
    shutil.copy(TEMPLATE, folder / "dreams")
    return folder


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


def run_small(folder, *arguments, name="run", script=SCRIPT, prelude=""):
    """Run the script on few digits, without a network, in a process forked from one that has done the imports."""
    process = FORKS.Process(target=child, args=(folder, name, script, arguments, prelude))
    process.start()
    process.join(300)
    printed = [(folder / f"{name}.{end}").read_text() for end in ("out", "err")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def edited(folder, name, value):
    """A copy of the script in `folder` with another value for one of its settings."""
    text, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", SCRIPT.read_text(), flags=re.MULTILINE)
    assert count == 1
    (folder / SCRIPT.name).write_text(text)
    return folder / SCRIPT.name


def levels(path, mode="L", frame=0):
    """A picture's pixels, from 0 to 255: (height, width), or (height, width, 3)."""
    with Image.open(path) as image:
        image.seek(frame)
        return torch.tensor(list(image.convert(mode).tobytes())).view(*image.size[::-1], -1).squeeze(-1)


def draws(seed, count):
    """The points of the dreams and the noise of the evaluation that a seed decides: (64, 2), (count, 2)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 2, generator=generator), torch.randn(count, 2, generator=generator)
