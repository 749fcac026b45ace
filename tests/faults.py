"""What can go wrong in a process: functions for run_script(folder, ..., fault=...).

Each is called in the process before the program starts. With functools.partial it can
be given an argument.
"""

import ctypes
import locale
import os
import resource
import signal
import sys
from pathlib import Path

import torch


# ---- The process is stopped ----------------------------------------------------------
def end_itself(number):
    """Return a function that sends the signal `number` to its own process."""
    return lambda *_, **__: os.kill(os.getpid(), number)


def killed_at_move(number):
    """SIGKILL just before the `number`-th file is moved to its place."""
    moves = []

    def count(event, arguments):
        # What Python tells of os.replace is called "os.rename".
        if event == "os.rename" and "dream_" in str(arguments[0]):
            moves.append(arguments)
            if len(moves) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def killed_in_writing():
    """SIGKILL as soon as 100,000 bytes of a file are written and more are to follow."""
    no_room_beyond(100_000)
    signal.signal(signal.SIGXFSZ, end_itself(signal.SIGKILL))


def listen_to_ctrl_c():
    """Hear SIGINT even under nohup, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ctrl_c_before_training():
    """When the training images are opened."""
    listen_to_ctrl_c()

    def interrupt(event, arguments):
        if event == "open" and "train-images" in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(interrupt)


def ctrl_c_in_training():
    listen_to_ctrl_c()
    torch.optim.Adam.step = end_itself(signal.SIGINT)


def ctrl_c_in_saving():
    listen_to_ctrl_c()
    os.replace = end_itself(signal.SIGINT)


# ---- The GPU ------------------------------------------------------------------------
def little_gpu_memory():
    """Leave this process a few hundred MB of the GPU."""
    torch.cuda.set_per_process_memory_fraction(0.003)


def step_that_waits():
    """Let each training step read a number from the GPU."""
    take_step = torch.optim.Adam.step

    def reading_step(self, *arguments):
        result = take_step(self, *arguments)
        self.param_groups[0]["params"][0].sum().item()
        return result

    torch.optim.Adam.step = reading_step


# ---- The files -----------------------------------------------------------------------
def give_up_privileges():
    """Obey the permissions of files, which root does not while it has capabilities."""
    version_3 = (0x20080522).to_bytes(4, sys.byteorder)
    header = version_3 + bytes(4)
    assert ctypes.CDLL(None).capset(header, bytes(24)) == 0


def no_room_beyond(size):
    """Let no file grow beyond `size` bytes, as if the disk were full.

    The reason is then "File too large", and not "No space left on device": both are an
    OSError.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def folders_cannot_be_removed():
    """As on NFS, where a file that was open leaves a hidden one behind."""

    def rmdir(path, **_):
        raise OSError(39, "Directory not empty", path)

    os.rmdir = rmdir


# ---- The surroundings ----------------------------------------------------------------
def no_bars():
    """TQDM_DISABLE=1, tqdm's own variable, which it reads when it is imported."""
    os.environ["TQDM_DISABLE"] = "1"
    for name in [name for name in sys.modules if name.startswith("tqdm")]:
        del sys.modules[name]


def ascii_by_default():
    """As in the locale C: a text file is ASCII unless its encoding is named."""
    locale.setlocale(locale.LC_CTYPE, "C")


def no_network():
    """End the process at its first use of a socket."""

    def forbid(event, _):
        if event.startswith("socket."):
            sys.exit("a network call")

    sys.addaudithook(forbid)


def no_data():
    """End the process when it opens a file of the data."""

    def forbid(event, arguments):
        if event == "open" and "data" in Path(str(arguments[0])).parts:
            sys.exit(f"opened {arguments[0]}")

    sys.addaudithook(forbid)


def read_only_and_no_network():
    give_up_privileges()
    no_network()


def denormals_counted():
    """End the process if a thread that trains does not set denormals to 0."""
    take_step = torch.optim.Adam.step
    tiny = torch.full((100_000,), 1e-40)  # by one thread: the second does not exist yet
    torch.set_num_threads(2)

    def first_step(self, *arguments):
        torch.optim.Adam.step = take_step
        if (tiny * torch.ones(1)).any():
            sys.exit("denormals are left")
        torch.set_num_threads(1)  # two threads are slow where others run
        return take_step(self, *arguments)

    torch.optim.Adam.step = first_step
