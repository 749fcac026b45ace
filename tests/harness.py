"""Ways to run the script as the real process it is, in folders with real data."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch import optim
from torch.utils.data import DataLoader

import quest_12_1 as quest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "quest_12_1.py"
RAW = "data/MNIST/raw"  # below a working folder
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # where nobody answers


def copy_archives(folder):
    (folder / RAW).mkdir(parents=True)
    for archive in (ROOT / RAW).glob("*.gz"):
        shutil.copy(archive, folder / RAW)


def loader_of(x):
    """Batches of x as the script makes them."""
    return DataLoader(x, sampler=quest.ShuffledBatches(x, quest.BATCH_SIZE), batch_size=None)


def adam_of(model):
    """The optimizer as the script makes it."""
    return optim.Adam(model.parameters(), lr=quest.LEARNING_RATE, fused=True)


def run(folder, *arguments, **environment):
    """Run the script in a fresh interpreter in `folder`, to its end."""
    command = [sys.executable, str(SCRIPT), *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


class Run:
    """The script running in a process of its own, forked from one that has done the imports."""

    def __init__(self, nursery, pid, folder, name):
        self.nursery, self.pid = nursery, pid
        self.out_file, self.err_file = folder / f"{name}.out", folder / f"{name}.err"

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            os.kill(self.pid, number)

    def listens(self, seconds=60):
        """Wait until the process handles SIGTERM, which it does from the moment that its imports are done."""
        deadline = time.monotonic() + seconds
        caught = 0
        while not caught >> (signal.SIGTERM - 1) & 1:
            assert time.monotonic() < deadline, "never listened to signals"
            status = Path(f"/proc/{self.pid}/status").read_text()
            caught = int(status.split("SigCgt:")[1].split()[0], 16)

    def ends_within(self, seconds):
        """Wait for the process's end, but no longer than `seconds`; say whether it came."""
        return bool(select.select([self.nursery.process.stdout], [], [], seconds)[0])

    def says(self, text, seconds=60):
        """Wait until standard error holds `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.err_file.read_text():
            assert time.monotonic() < deadline, f"never said {text!r}: {self.err_file.read_text()}"
            time.sleep(0.005)

    def wait(self):
        """The exit code, as subprocess gives it: negative for the signal that killed it."""
        if self.nursery.current is self:
            self.returncode = json.loads(self.nursery.process.stdout.readline())
            self.nursery.current = None
        self.stdout, self.stderr = self.out_file.read_text(), self.err_file.read_text()
        return self.returncode


class Nursery:
    """A process that has imported torch once and forks a child for every run, which saves each some 3 seconds.

    The child runs the script as __main__, from its first line to its exit, in its own process with real signals.
    """

    CODE = """
import json, os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import quest_12_1
for line in sys.stdin:
    folder, name, arguments, environment, prelude = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        for descriptor, path in ((0, os.devnull), (1, name + ".out"), (2, name + ".err")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        os.environ.update(environment)
        sys.argv = [sys.argv[1], *arguments]
        exec(prelude)
        runpy.run_path(sys.argv[0], run_name="__main__")
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self):
        command = [sys.executable, "-c", self.CODE, str(SCRIPT)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.current = None

    def start(self, folder, *arguments, name="run", prelude="", **environment):
        """Start the script; `prelude` is Python that the child executes first, as to take away its rights."""
        assert self.current is None, "one at a time"
        for suffix in ("out", "err"):
            (folder / f"{name}.{suffix}").write_text("")
        request = [str(folder), name, ["--device", "cpu", *arguments], environment, prelude]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        self.current = Run(self, pid, folder, name)
        return self.current

    def run(self, folder, *arguments, **settings):
        """Start the script and wait for its end."""
        finished = self.start(folder, *arguments, **settings)
        finished.wait()
        return finished

    def close(self):
        if self.current:
            self.current.send(signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def only_message(result):
    """Assert that a failed run said one message on standard error and nothing else; return it."""
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("quest_12_1.py: ")
    assert result.stderr.count("quest_12_1.py: ") == 1
    return result.stderr
