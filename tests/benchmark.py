"""How fast the project is beside the textbook: python tests/benchmark.py --device cpu (README.md here explains it)."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIDES = {"textbook": ["tests/plain.py"], "this project": ["quest_12_1.py", "--json"]}
COLUMNS = ["whole run, s", "training, s", "peak memory, MiB", "held-out loss, nats per image"]


def measure(folder, script, *arguments):
    """Run one process to its end; return its figures in the order of COLUMNS, and what its line of JSON says."""
    command, start = [sys.executable, f"{ROOT}/{script}", *arguments], time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:
        said = json.loads(process.stdout.read())
        _, process.returncode, usage = os.wait4(process.pid, 0)
    memory, seconds = usage.ru_maxrss / 1024, time.perf_counter() - start
    return [seconds, said["training_seconds"], memory, said["losses"][-1]["held_out"]], said


def cell(values, digits=1):
    return "{:,.{d}f} [{:,.{d}f}-{:,.{d}f}]".format(statistics.median(values), min(values), max(values), d=digits)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"device": "cuda", "epochs": 10, "rounds": 3}.items():  # rounds: counted runs of each side
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    options = parser.parse_args()
    runs = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(f"{ROOT}/data", f"{folder}/data")
        for turn in range(options.rounds + 1):  # the first, of one epoch, warms up
            job = ["--device", options.device, "--epochs", str(options.epochs if turn else 1), "--seed", str(turn)]
            for side, command in SIDES.items():
                figures, said = measure(folder, *command, *job)  # the project, the last, tells the device's name
                runs[side] += [figures] if turn else []
    print(f"{said['device_name']}, torch {torch.__version__}: median [least-greatest] of {options.rounds} rounds\n")
    print("| side |", " | ".join(COLUMNS), "|\n|" + " --- |" * (len(COLUMNS) + 1))
    for side, rows in runs.items():
        print(f"| {side} |", " | ".join(map(cell, zip(*rows))), "|")
    ratios = [theirs[1] / ours[1] for theirs, ours in zip(*runs.values())]  # by rounds, since machines waver
    print(f"\nTraining, textbook / this project: {cell(ratios, digits=2)}")


if __name__ == "__main__":
    main()
