"""What the tests share: a clone, programs as real processes, comparisons in words.

A program runs in a process that is forked from a server which has imported PyTorch,
since a fresh interpreter needs 3 s for that. Everything else about the process is real:
it has its own folder, arguments, output, signals, limits and exit code.

This module does not import the script, so that a child imports its own clone's.
"""

import json
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "quest_12_1.py"
GALLERY = ROOT / "dreams" / "gallery.py"
TEMPLATE = ROOT / "dreams" / "plane.html"
MNIST = ROOT / "data" / "MNIST" / "raw"

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
TIME_LIMIT = 1200  # seconds for one process; a slow machine is no failure

# The options of the small run that many tests look at.
SMALL = ["--json", "--epochs", "2", "--seed", "3", "--latent-dim", "2"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torchvision", "torch.utils.data", "torch.optim", "tqdm", "PIL.ImageDraw"]
)


# ---- Data and clones -----------------------------------------------------------------
def read_idx(path):
    """Return the numbers of one of MNIST's files: (N, 28, 28) or (N,), uint8."""
    data = bytearray(path.read_bytes())
    dimensions = data[3]
    shape = struct.unpack_from(f">{dimensions}i", data, 4)
    numbers = torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * dimensions)
    return numbers.view(shape)


def write_idx(path, numbers):
    """Write a tensor of uint8 as one of MNIST's files."""
    head = bytes([0, 0, 8, numbers.dim()]) + struct.pack(
        f">{numbers.dim()}i", *numbers.shape
    )
    path.write_bytes(head + numbers.contiguous().numpy().tobytes())


def write_split(raw, split, images, labels):
    """Write one of a data set's two splits, "train" or "t10k" (held out), into `raw`.

    images: (N, H, W), labels: (N,), both uint8.
    """
    raw.mkdir(parents=True, exist_ok=True)
    write_idx(raw / f"{split}-images-idx3-ubyte", images)
    write_idx(raw / f"{split}-labels-idx1-ubyte", labels)


def write_data(raw, images, labels):
    """Write a data set into `raw` whose two splits hold the same images."""
    write_split(raw, "train", images, labels)
    write_split(raw, "t10k", images, labels)


def make_clone(folder, data):
    """Make `folder` a clone: script, gallery and template, and a link to `data`."""
    (folder / "dreams").mkdir()
    shutil.copy(SCRIPT, folder)
    shutil.copy(GALLERY, folder / "dreams")
    shutil.copy(TEMPLATE, folder / "dreams")
    (folder / "data").symlink_to(data)
    return folder


# ---- Processes -----------------------------------------------------------------------
def run_script(folder, *arguments, device="cpu", fault=None, threads=1):
    """Run quest_12_1.py in a process, in the clone `folder`.

    device: for --device; None for no such option.
    fault: a function that makes something go wrong, called first in that process.
    threads: of PyTorch's; None for as many as it takes by itself.
    Returns a subprocess.CompletedProcess: returncode, stdout, stderr.
    """
    options = ["--device", device] if device else []
    return run_job(folder, partial(script_job, [*options, *arguments], fault, threads))


def run_gallery(folder, *arguments, fault=None):
    """Run python -m dreams.gallery in a process, in the clone `folder`."""
    return run_job(folder, partial(gallery_job, arguments, fault))


def run_job(folder, job):
    """Call job() in a process of its own, in `folder`; return a CompletedProcess."""
    with tempfile.TemporaryDirectory() as printed:
        process = FORKS.Process(target=child, args=(folder, job, printed))
        process.start()
        process.join(TIME_LIMIT)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"the process has not ended within {TIME_LIMIT} s")
        # As bytes first: read as text, a bar's carriage returns would end lines.
        out = Path(printed, "out").read_bytes().decode()
        err = Path(printed, "err").read_bytes().decode()
    return subprocess.CompletedProcess(job, process.exitcode, out, err)


def start_server():
    """Let the server of processes import PyTorch now, not when the first is needed."""
    multiprocessing.forkserver.ensure_running()


def end_processes():
    """End all processes that still run a job."""
    for process in multiprocessing.active_children():
        process.kill()


def child(folder, job, printed):
    """What the process does: its output goes into files, then it does the job."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(Path(printed, name), os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(file, descriptor)
    job()


def script_job(arguments, fault, threads):
    """What run_script's process does: first the fault, then the script as it is."""
    if threads:
        torch.set_num_threads(threads)  # two processes with two threads each crawl
    if fault:
        fault()
    sys.argv = ["quest_12_1.py", *arguments]
    runpy.run_path("quest_12_1.py", run_name="__main__")


def gallery_job(arguments, fault):
    """What run_gallery's process does: first the fault, then the gallery as it is."""
    torch.set_num_threads(1)
    if fault:
        fault()
    sys.argv = ["gallery.py", *arguments]
    runpy.run_module("dreams.gallery", run_name="__main__", alter_sys=True)


# ---- Expectations, which say in words what came --------------------------------------
def expect_success(result):
    """Expect exit code 0."""
    assert result.returncode == 0, (
        f"the program ended with {result.returncode} and said: {result.stderr[-2000:]}"
    )


def expect_one_message(result, *parts, program="quest_12_1.py"):
    """Expect exit code 1 and one message of the program that holds all `parts`.

    Returns the message.
    """
    said = result.stderr
    assert result.returncode == 1, (
        f"expected exit code 1, not {result.returncode}: {said}"
    )
    assert "Traceback" not in said, f"expected a message, not a traceback: {said}"

    lines = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
    assert len(lines) == 1, (
        f"expected one message on standard error, not {len(lines)}: {said!r}; "
        f"standard output is {result.stdout!r}"
    )
    assert said.splitlines()[-1] == lines[0], f"the message is not the end: {said}"
    for part in parts:
        assert part in lines[0], f"the message lacks {part!r}: {lines[0]}"
    return lines[0].removeprefix(f"{program}: ")


def expect_signal(result, number, missed=None):
    """Expect the process to have died of a signal, as Ctrl-C and kill do it.

    missed: what has not happened if it ended well, where a fault waits for something.
    """
    name = signal.Signals(number).name
    reason = missed if missed and result.returncode == 0 else result.stderr
    assert result.returncode == -number, (
        f"expected an end by {name}, not {result.returncode}: {reason}"
    )


def expect_equal(got, expected):
    """Expect two dicts of tensors to be equal bit by bit, or tell what differs."""
    assert got.keys() == expected.keys(), (
        f"expected the names {list(expected)}, not {list(got)}"
    )
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, (
            f"{name}: expected the shape {tuple(tensor.shape)}, "
            f"not {tuple(got[name].shape)}"
        )
        differ = got[name] != tensor
        assert not differ.any(), f"{name}: {difference(got[name], tensor, differ)}"


def difference(got, expected, differ):
    """Say in words how `got` differs from `expected` where `differ` is true."""
    most = (got.double() - expected.double()).abs()[differ].max().item()
    first = differ.nonzero()[0].tolist()
    return (
        f"{differ.sum()} of {differ.numel()} numbers differ, by {most:.3g} at most; "
        f"the first, at {first}, is {got[tuple(first)]} in place of "
        f"{expected[tuple(first)]}"
    )


def expect_close(got, expected, **tolerance):
    """Expect two dicts of tensors to be equal up to rounding, or tell what differs."""
    assert got.keys() == expected.keys(), (
        f"expected the names {list(expected)}, not {list(got)}"
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name],
            tensor,
            **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def expect_picture(got, expected, what="the picture"):
    """Expect a picture's levels to be the expected ones, up to rounding.

    Where NaN is expected, they are not looked at.
    """
    assert got.shape == expected.shape, (
        f"{what}: expected the shape {tuple(expected.shape)}, not {tuple(got.shape)}"
    )
    differ = (got - expected).abs() > 1.001  # a level, and a float's own rounding
    assert not differ.any(), f"{what}: {difference(got, expected, differ)}"


def expect_no_black_picture(path, frame=0):
    """Expect a picture, or a frame of an animation, to show something."""
    brightest = levels(path, frame=frame).max()
    assert brightest > 0, f"{path.name}: frame {frame} is all black"


def files_in(folder):
    """Return all that is below `folder`: {path: bytes, or None for a folder}.

    But for what Python compiles, in __pycache__: it may write that at any import.
    """
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def expect_same_files(folder, before):
    """Expect `folder` to hold the same files, of the same bytes, as `before` says."""
    now = files_in(folder)
    assert now.keys() == before.keys(), (
        f"appeared: {sorted(now.keys() - before.keys())}, "
        f"disappeared: {sorted(before.keys() - now.keys())}"
    )
    changed = [name for name in now if now[name] != before[name]]
    assert not changed, f"changed: {changed}"


def expect_old_or_new(now, old, new, replaced):
    """Expect `replaced` of the files `old` to be wholly the new ones, the others wholly
    the old ones, and beside them at most one temporary folder, .part-...

    now, old, new: what `files_in` returns.
    """
    gone = sorted(old.keys() - now.keys())
    assert not gone, f"disappeared: {gone}"
    for name, data in old.items():
        assert now[name] in (data, new[name]), (
            f"{name}: expected the old {len(data)} bytes or the new {len(new[name])}, "
            f"not these {len(now[name])}"
        )
    changed = [name for name in old if now[name] != old[name]]
    assert len(changed) == replaced, f"expected {replaced} new files, not {changed}"

    appeared = sorted(now.keys() - old.keys())
    folders = [name for name in appeared if now[name] is None]
    hidden = [name for name in appeared if "/.part-" in name]
    assert appeared == hidden, f"appeared beside .part-...: {appeared}"
    assert len(folders) <= 1, f"expected one temporary folder at most, not {folders}"


def terminal_lines(printed):
    """Return the lines that a terminal shows in the end: what follows a carriage return
    is written over what was there."""
    lines = []
    for line in printed.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


# ---- Pictures, pages and draws -------------------------------------------------------
PICTURES = [
    "dream_canvas.png",
    "dream_codes.png",
    "dream_growth.gif",
    "dream_mirror.png",
    "dream_plane.html",
]  # what the gallery makes of a model with a plane


def data_of(page):
    """Return the data in the slot of a page, a text: a dict."""
    _, _, rest = page.partition('<script id="run" type="application/json">')
    data, _, _ = rest.partition("</script>")
    return json.loads(data)


def levels(path, mode="L", frame=0):
    """Return a picture's levels, 0 to 255: (H, W), or (H, W, 3) with mode "RGB"."""
    with Image.open(path) as image:
        image.seek(frame)
        return levels_of(image, mode)


def levels_of(image, mode="L"):
    """Return the levels of a picture that is in memory, as `levels` does."""
    data = bytearray(image.convert(mode).tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).float()
    return pixels.view(image.height, image.width, -1).squeeze(-1)


def draws(settings, count):
    """Return the dreams' z and the evaluation's eps for `count` held-out images.

    They come from the seed alone, so they are the same on every device.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    z = torch.randn(settings.samples, settings.latent_dim, generator=generator)
    eps = torch.randn(count, settings.latent_dim, generator=generator)
    return z, eps
