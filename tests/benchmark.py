"""How fast the project is beside the textbook: python tests/benchmark.py --device cpu (README.md here explains it)."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "this project"
SIDES = {  # what Python runs, less the options that all have; the last one tells the device's name
    "textbook": ["tests/plain.py"],
    "PyTorch's example's loader": ["tests/plain.py", "--workers", "1"],
    PROJECT: ["quest_12_1.py", "--json"],
}
COLUMNS = ["whole run, s", "training, s", "peak memory, MiB", "held-out loss, nats per image"]


def measure(folder, script, *arguments):
    """Run one process to its end; return its figures in the order of COLUMNS, and what its last line of JSON says."""
    command, start = [sys.executable, str(ROOT / script), *arguments], time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        *_, last_line = process.stdout.read().splitlines() or [b""]
        _, process.returncode, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"benchmark: this failed: {' '.join(command)}")
    said = json.loads(last_line)
    return [seconds, said["training_seconds"], usage.ru_maxrss / 1024, said["held_out_loss"]["total"]], said


def cell(values, digits=1):
    return "{:,.{d}f} [{:,.{d}f}-{:,.{d}f}]".format(statistics.median(values), min(values), max(values), d=digits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"device": "cuda", "epochs": 10, "rounds": 3}.items():  # rounds: counted runs of each side
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    options = parser.parse_args()

    if not options.device.startswith("cuda"):
        del SIDES["PyTorch's example's loader"]  # it has a worker process on a GPU alone; else it is the textbook's
    runs = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ROOT / "data", Path(folder) / "data")
        for turn in range(options.rounds + 1):  # the first, of one epoch, warms up
            job = ["--device", options.device, "--epochs", str(options.epochs if turn else 1), "--seed", str(turn)]
            for side, command in SIDES.items():
                print(f"round {turn} of {options.rounds}: {side}", file=sys.stderr)
                figures, said = measure(folder, *command, *job)
                runs[side] += [figures] if turn else []

    setting = f"torch {torch.__version__}, {options.epochs} epochs, {options.rounds} rounds: median [least-greatest]"
    print(f"{said['device_name']}, {setting}\n\n| side |", " | ".join(COLUMNS), "|\n|" + " --- |" * (len(COLUMNS) + 1))
    for side, rows in runs.items():
        print(f"| {side} |", " | ".join(map(cell, zip(*rows))), "|")
    for side in list(SIDES)[:-1]:  # round by round, since machines waver
        ratios = [theirs[1] / ours[1] for theirs, ours in zip(runs[side], runs[PROJECT])]
        print(f"\nTraining, {side} / {PROJECT}: {cell(ratios, digits=2)}")
    sys.path.insert(0, str(ROOT))
    from harness import operations_of_a_step  # not before: a process starts with the memory of the one that starts it

    print(f"\nA training step: {operations_of_a_step(options.device)} operations.")


if __name__ == "__main__":
    main()
