"""How fast the project is, measured side by side with the textbook and with the machine's own limits.

    python tests/benchmark.py --device cpu              the whole table: five sides, 10 epochs, 3 rounds
    python tests/benchmark.py --device cpu --epochs 2   the same in a third of the time, scaled to 10 epochs
    python tests/benchmark.py --json                    the figures as JSON

Every figure comes from whole processes in fresh interpreters, the sides in turn, after a warm-up of each. What is
quoted is the median of the rounds, with the least and the greatest in brackets.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 10  # of the recipe; what shorter runs are scaled to
IMAGES, STEPS = 60_000, 469  # an epoch
TOLERANCE = 1.5  # nats an image by which the sides' held-out losses may differ: seeds alone differ by up to 2

START_UP, TEXTBOOK, EXAMPLE, PROJECT, ARITHMETIC = (
    "start-up floor",
    "textbook",
    "PyTorch's example, its way",
    "this project",
    "arithmetic floor",
)


def commands(device, epochs):
    """The command line of each side, less its seed."""
    here, plain = str(Path(__file__).resolve()), str(ROOT / "tests" / "plain.py")
    job = ["--device", device, "--epochs", str(epochs)]
    return {
        START_UP: [sys.executable, here, "--side", START_UP, *job],
        TEXTBOOK: [sys.executable, plain, *job],
        EXAMPLE: [sys.executable, plain, *job, "--workers", "1"],
        PROJECT: [sys.executable, str(ROOT / "quest_12_1.py"), *job, "--json"],
        ARITHMETIC: [sys.executable, here, "--side", ARITHMETIC, *job],
    }


def start_up_floor(device):
    """What any program of this kind must do before its first step. Returns no figure: the process is the figure."""
    import torch
    import torchvision  # noqa: F401
    import tqdm  # noqa: F401

    layer = torch.nn.Linear(784, 400).to(device)
    torch.optim.Adam(layer.parameters())
    (torch.rand(128, 784, device=device) @ layer.weight.T).sum().item()
    return {}


def arithmetic_floor(device, epochs):
    """Seconds for the five large matrix products of each step alone, into tensors that exist already.

    They are fc1 and fc4 forwards, the gradients of both weights, and the gradient that fc4 passes back; the products
    with the two latent coordinates are left out, which makes this floor a little too low.
    """
    import torch

    def synchronize():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    def of(*shape):
        return torch.randn(shape, device=device)

    torch.set_flush_denormal(True)
    x, fc1, hidden, fc4 = of(128, 784), of(400, 784), of(128, 400), of(784, 400)
    grad_hidden, grad_out = of(128, 400), of(128, 784)
    to_hidden, to_out, to_fc1, to_fc4 = of(128, 400), of(128, 784), of(400, 784), of(784, 400)

    def products():
        torch.mm(x, fc1.T, out=to_hidden)
        torch.mm(hidden, fc4.T, out=to_out)
        torch.mm(grad_out.T, hidden, out=to_fc4)
        torch.mm(grad_out, fc4, out=to_hidden)
        torch.mm(grad_hidden.T, x, out=to_fc1)

    products()
    synchronize()
    start = time.perf_counter()
    for _ in range(STEPS * epochs):
        products()
    synchronize()
    return {"training_seconds": time.perf_counter() - start}


def measure(command, folder):
    """Run one process to its end; return its seconds, its peak memory, and what its last line of JSON says."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            raise SystemExit(f"benchmark: {' '.join(command)} failed:\n{err.read()[-2000:]}")
        answer = json.loads(out.read().splitlines()[-1])
    held_out = answer.get("held_out_loss")
    return {
        "seconds": seconds,
        "training_seconds": answer.get("training_seconds"),
        "peak_mib": usage.ru_maxrss / 1024,
        "held_out_loss": held_out["total"] if isinstance(held_out, dict) else held_out,
    }


def scaled(figures, epochs):
    """The figures of one run of `epochs` epochs as they would be for the recipe's 10."""
    training = figures["training_seconds"]
    if training is None:
        return figures
    rest = figures["seconds"] - training
    training *= EPOCHS / epochs
    rate = IMAGES * EPOCHS / training
    return {
        **figures,
        "seconds": rest + training,
        "training_seconds": training,
        "images_per_second": rate,
        "rest": rest,
    }


def spread(values):
    """(median, least, greatest), or None where a side has no such figure."""
    values = [value for value in values if value is not None]
    return (statistics.median(values), min(values), max(values)) if values else None


def benchmark(device, epochs, rounds):
    """Run every side `rounds` times in turn; return the report as a dict."""
    from tqdm import tqdm

    sides = commands(device, epochs)
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=(rounds + 1) * len(sides), unit="run") as bar:
        os.symlink(ROOT / "data", Path(folder) / "data")
        for turn in range(rounds + 1):
            for side, command in (sides if turn else commands(device, 1)).items():
                bar.set_postfix_str(f"{side}, {f'round {turn}' if turn else 'warm-up'}")
                figures = measure([*command, "--seed", str(turn)], folder)
                if turn:
                    runs[side].append(scaled(figures, epochs))
                bar.update()

    keys = ("seconds", "training_seconds", "images_per_second", "peak_mib", "held_out_loss", "rest")
    table = {side: {key: spread([run.get(key) for run in runs[side]]) for key in keys} for side in sides}

    def ratio(above, below, key, below_key=None):
        """Round by round, so that a machine that slows down slows both."""
        pairs = zip(runs[above], runs[below], strict=True)
        return spread([one[key] / other[below_key or key] for one, other in pairs])

    def loss(side):
        return table[side]["held_out_loss"][0]

    return {
        "machine": machine(device),
        "epochs": epochs,
        "rounds": rounds,
        "sides": table,
        "ratios": {
            "training: textbook / this project": ratio(TEXTBOOK, PROJECT, "training_seconds"),
            "training: PyTorch's example, its way / this project": ratio(EXAMPLE, PROJECT, "training_seconds"),
            "training: this project / arithmetic floor": ratio(PROJECT, ARITHMETIC, "training_seconds"),
            "whole run: this project / start-up floor": ratio(PROJECT, START_UP, "seconds"),
            "outside training: this project / start-up floor": ratio(PROJECT, START_UP, "rest", "seconds"),
        },
        "same_held_out_loss": max(abs(loss(side) - loss(PROJECT)) for side in (TEXTBOOK, EXAMPLE)) <= TOLERANCE,
    }


def machine(device):
    """One line that says what was measured on."""
    import torch

    if torch.device(device).type == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
        name = f"{torch.cuda.get_device_name(device)}, driver {driver}"
    else:
        with open("/proc/cpuinfo") as cpuinfo:
            models = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def as_text(report):
    """The report as tables in Markdown."""

    def cell(figure, digits):
        return "" if figure is None else "{:,.{d}f} [{:,.{d}f}-{:,.{d}f}]".format(*figure, d=digits)

    scale = "" if report["epochs"] == EPOCHS else f", {report['epochs']} epochs scaled to {EPOCHS}"
    lines = [
        f"{report['machine']}; {report['rounds']} rounds{scale}; median [least-greatest]",
        "",
        "| side | whole run, s | training, s | images/s | peak memory, MiB | held-out loss, nats an image |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    shown = (("seconds", 1), ("training_seconds", 1), ("images_per_second", 0), ("peak_mib", 0), ("held_out_loss", 1))
    for side, figures in report["sides"].items():
        lines.append(f"| {side} | " + " | ".join(cell(figures[key], digits) for key, digits in shown) + " |")
    lines += ["", "| ratio | |", "| --- | --- |"]
    lines += [f"| {name} | {cell(figure, 2)} |" for name, figure in report["ratios"].items()]
    verdict = "agree" if report["same_held_out_loss"] else "DISAGREE"
    lines += ["", f"Held-out losses {verdict} within {TOLERANCE} nats."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="where all sides run (default cuda)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of each run; fewer are scaled (default {EPOCHS})")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each side (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--side", choices=(START_UP, ARITHMETIC), help=argparse.SUPPRESS)
    parser.add_argument("--seed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epochs < 1 or options.rounds < 1:
        parser.error("--epochs and --rounds take whole numbers from 1")
    if options.side == START_UP:
        print(json.dumps(start_up_floor(options.device)))
    elif options.side == ARITHMETIC:
        print(json.dumps(arithmetic_floor(options.device, options.epochs)))
    else:
        report = benchmark(options.device, options.epochs, options.rounds)
        print(json.dumps(report) if options.json else as_text(report))
        return 0 if report["same_held_out_loss"] else 1


if __name__ == "__main__":
    sys.exit(main())
