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
PROJECT, TEXTBOOK, EXAMPLE = "this project", "textbook", "PyTorch's example's loader"
STEP = "step of one element"
COLUMNS = {
    "seconds": "whole run, s",
    "training_seconds": "training, s",
    "peak_mib": "peak memory, MiB",
    "held_out": "held-out loss, nats per image",
}


def step_of_one_element(device):
    """Milliseconds of a training step, loader included, on tensors of one element; and the operations of a real step.

    This is the time of Python and PyTorch themselves: on a GPU, about the time of a real step.
    """
    sys.path.insert(0, str(ROOT))
    from harness import operations_of_a_step, quest

    torch.set_flush_denormal(True)
    operations, steps = len(operations_of_a_step(device)), 2000
    quest.PIXELS = quest.HIDDEN = quest.LATENT_DIM = quest.BATCH_SIZE = 1
    model, x = quest.VAE().to(device), torch.rand(steps, 1, device=device)
    quest.train(model, x, 1)  # warms up
    start = time.perf_counter()
    quest.train(model, x, 1)
    return {"operations": operations, "milliseconds": 1000 * (time.perf_counter() - start) / steps}


def commands(device, epochs):
    """The command line of each side, less its seed."""
    job = ["--device", device, "--epochs", str(epochs)]
    plain = [sys.executable, str(ROOT / "tests" / "plain.py"), *job]
    project = [sys.executable, str(ROOT / "quest_12_1.py"), *job, "--json"]
    step = [sys.executable, __file__, "--step", *job]
    return {TEXTBOOK: plain, EXAMPLE: [*plain, "--workers", "1"], PROJECT: project, STEP: step}


def measure(command, folder):
    """Run one process to its end; return its seconds, its peak memory, and what its last line of JSON says."""
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"benchmark: this failed: {' '.join(command)}")
        out.seek(0)
        figures = json.loads(out.read().splitlines()[-1])
    figures["held_out"] = figures.get("held_out_loss", {}).get("total")
    return {**figures, "seconds": seconds, "peak_mib": usage.ru_maxrss / 1024}


def cell(values, digits=2):
    """Median [least-greatest], or nothing where a side has no such figure."""
    values = [value for value in values if value is not None]
    figures = (statistics.median(values), min(values), max(values)) if values else ()
    return "{:,.{d}f} [{:,.{d}f}-{:,.{d}f}]".format(*figures, d=digits) if figures else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where all sides run (default cuda)")
    parser.add_argument("--epochs", type=int, default=10, help="of each run (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each side (default 3)")
    parser.add_argument("--step", action="store_true", help="only measure the step of one element, as JSON")
    parser.add_argument("--seed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step_of_one_element(options.device)))
        return

    runs = {side: [] for side in commands(options.device, 1)}
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(ROOT / "data", Path(folder) / "data")
        for turn in range(options.rounds + 1):  # the first, of one epoch, warms up
            for side, command in commands(options.device, options.epochs if turn else 1).items():
                print(f"round {turn} of {options.rounds}: {side}", file=sys.stderr)
                figures = measure([*command, "--seed", str(turn)], folder)
                runs[side] += [figures] if turn else []

    print(f"{runs[PROJECT][0]['device_name']}, torch {torch.__version__}, {options.epochs} epochs, ", end="")
    print(f"{options.rounds} rounds: median [least-greatest]\n\n| side |", " | ".join(COLUMNS.values()), "|")
    print("|" + " --- |" * (len(COLUMNS) + 1))
    for side in runs:
        print(f"| {side} |", " | ".join(cell([run.get(key) for run in runs[side]], 1) for key in COLUMNS), "|")
    for side in (TEXTBOOK, EXAMPLE):  # round by round, since machines waver
        pairs = zip(runs[side], runs[PROJECT], strict=True)
        ratios = [one["training_seconds"] / ours["training_seconds"] for one, ours in pairs]
        print(f"\nTraining, {side} / {PROJECT}: {cell(ratios)}")
    milliseconds = cell([run["milliseconds"] for run in runs[STEP]])
    print(f"\nA step: {runs[STEP][0]['operations']} operations; on tensors of one element {milliseconds} ms.")


if __name__ == "__main__":
    main()
