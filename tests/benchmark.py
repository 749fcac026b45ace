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
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIDES = {
    "textbook": ["tests/benchmark.py", "--textbook"],
    "this project": ["quest_12_1.py", "--json"],
}
COLUMNS = [
    "whole run, s",
    "training, s",
    "peak memory, MiB",
    "held-out loss, nats per image",
]


class PlainVAE(nn.Module):
    """The recipe's network, with the project's names, so that weights can be compared."""

    def __init__(self, pixels=784, hidden=400, latent_dim=2):
        super().__init__()
        self.encoder_hidden = nn.Linear(pixels, hidden)
        self.encoder_mu = nn.Linear(hidden, latent_dim)
        self.encoder_logvar = nn.Linear(hidden, latent_dim)
        self.decoder_hidden = nn.Linear(latent_dim, hidden)
        self.decoder_pixels = nn.Linear(hidden, pixels)


def plain_loss(model, x):
    """Return the batch's summed loss, computed as the paper writes it."""
    x = x.flatten(1)
    h = F.relu(model.encoder_hidden(x))
    mu = model.encoder_mu(h)
    logvar = model.encoder_logvar(h)

    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)

    h = F.relu(model.decoder_hidden(z))
    recon_x = torch.sigmoid(model.decoder_pixels(h))
    bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))
    return bce + kld


def plain_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = plain_loss(model, x)
    loss.backward()
    optimizer.step()
    return loss.item()


def textbook(device, epochs, seed):
    """The recipe as a textbook trains it: image by image, default Adam, .item() at each step. No code of the script."""
    torch.manual_seed(seed)
    train_dataset, test_dataset = (
        datasets.MNIST("data", train, transforms.ToTensor()) for train in (True, False)
    )
    model = PlainVAE().to(device)
    optimizer, start = optim.Adam(model.parameters(), lr=1e-3), time.perf_counter()
    for _ in range(epochs):
        for x, _ in DataLoader(train_dataset, batch_size=128, shuffle=True):
            plain_step(model, optimizer, x.to(device))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        total = sum(
            plain_loss(model, x.to(device)).item()
            for x, _ in DataLoader(test_dataset, batch_size=128)
        )
    print(
        json.dumps(
            {
                "training_seconds": seconds,
                "losses": [{"held_out": total / len(test_dataset)}],
            }
        )
    )


def measure(folder, script, *arguments):
    """Run one process to its end; return its figures in the order of COLUMNS, and what its line of JSON says."""
    command, start = (
        [sys.executable, f"{ROOT}/{script}", *arguments],
        time.perf_counter(),
    )
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:
        said = json.loads(process.stdout.read())
        _, process.returncode, usage = os.wait4(process.pid, 0)
    memory, seconds = usage.ru_maxrss / 1024, time.perf_counter() - start
    return [
        seconds,
        said["training_seconds"],
        memory,
        said["losses"][-1]["held_out"],
    ], said


def compare(device, epochs, rounds):
    """Run both sides in turn, after one warm-up each; print their figures, median [least-greatest]."""
    runs = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(f"{ROOT}/data", f"{folder}/data")
        for turn in range(rounds + 1):  # the first, of one epoch, warms up
            job = [
                "--device",
                device,
                "--epochs",
                str(epochs if turn else 1),
                "--seed",
                str(turn),
            ]
            for side, command in SIDES.items():
                figures, said = measure(
                    folder, *command, *job
                )  # the project, the last, tells the device's name
                runs[side] += [figures] if turn else []

    def cell(values, digits=1):
        return "{:,.{d}f} [{:,.{d}f}-{:,.{d}f}]".format(
            statistics.median(values), min(values), max(values), d=digits
        )

    print(
        f"{said['device_name']}, torch {torch.__version__}: median [least-greatest] of {rounds} rounds\n"
    )
    print("| side |", " | ".join(COLUMNS), "|\n|" + " --- |" * (len(COLUMNS) + 1))
    for side, rows in runs.items():
        print(f"| {side} |", " | ".join(map(cell, zip(*rows))), "|")
    ratios = [
        theirs[1] / ours[1] for theirs, ours in zip(*runs.values())
    ]  # by rounds, since machines waver
    print(f"\nTraining, textbook / this project: {cell(ratios, digits=2)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "device": "cuda",
        "epochs": 10,
        "rounds": 3,
        "seed": 0,
    }.items():  # rounds: counted runs
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            help="default: %(default)s",
        )
    parser.add_argument(
        "--textbook",
        action="store_true",
        help="train the textbook's way once, from --seed",
    )
    args = parser.parse_args()
    textbook(args.device, args.epochs, args.seed) if args.textbook else compare(
        args.device, args.epochs, args.rounds
    )
