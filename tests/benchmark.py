"""How fast the project is beside the textbook.

    python tests/benchmark.py                                     on a CUDA GPU
    python tests/benchmark.py --device cpu --epochs 3 --rounds 2

Runs whole processes in turn. README.md in this folder says how to read what it prints.
"""

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
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "textbook": [__file__, "--textbook"],
    "this project": [str(ROOT / "quest_12_1.py"), "--json"],
}
COLUMNS = (
    "whole run, s",
    "training, s",
    "peak memory, MiB",
    "held-out loss, nats per image",
)
TRAINING = COLUMNS.index("training, s")


# ---- The textbook --------------------------------------------------------------------
class PlainVAE(nn.Module):
    """The recipe's network, with the project's names, so that weights compare."""

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
    """Take one step on the batch x; return its summed loss, a number."""
    optimizer.zero_grad()
    loss = plain_loss(model, x)
    loss.backward()
    optimizer.step()
    return loss.item()


def textbook(device, epochs, seed):
    """Train the recipe as a textbook does, with no code of the script.

    Image by image from the data set, Adam with its defaults, .item() at each step.
    Prints a line of JSON with the keys of the script's that `measure` reads.
    """
    torch.manual_seed(seed)
    transform = transforms.ToTensor()
    train_dataset = datasets.MNIST("data", train=True, transform=transform)
    test_dataset = datasets.MNIST("data", train=False, transform=transform)
    model = PlainVAE().to(device)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)

    start = time.perf_counter()
    for _ in range(epochs):
        for x, _ in DataLoader(train_dataset, batch_size=128, shuffle=True):
            plain_step(model, optimizer, x.to(device))
    seconds = time.perf_counter() - start

    total = 0.0
    with torch.no_grad():
        for x, _ in DataLoader(test_dataset, batch_size=128):
            total += plain_loss(model, x.to(device)).item()
    losses = [{"held_out": total / len(test_dataset)}]
    print(json.dumps({"training_seconds": seconds, "losses": losses}))


# ---- The comparison ------------------------------------------------------------------
def measure(folder, command):
    """Run one process to its end; return its figures, in the order of COLUMNS."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], cwd=folder, stdout=subprocess.PIPE
    ) as process:
        answer = json.loads(process.stdout.read())
        _, process.returncode, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start

    training_seconds = answer["training_seconds"]
    memory = usage.ru_maxrss / 1024
    return [seconds, training_seconds, memory, answer["losses"][-1]["held_out"]]


def compare(device, epochs, rounds):
    """Run both variants in turn, after a warm-up each; print their figures."""
    runs = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "data").symlink_to(ROOT / "data")
        for command in VARIANTS.values():
            measure(folder, [*command, "--device", device, "--epochs", "1"])
        for seed in range(1, rounds + 1):
            job = ["--device", device, "--epochs", str(epochs), "--seed", str(seed)]
            for variant, command in VARIANTS.items():
                runs[variant].append(measure(folder, [*command, *job]))

    is_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if is_gpu else device
    print(f"{name}, torch {torch.__version__}: median [least-greatest] of {rounds}\n")
    print(f"| variant | {' | '.join(COLUMNS)} |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for variant, rows in runs.items():
        cells = [spread(column) for column in zip(*rows, strict=True)]
        print(f"| {variant} | {' | '.join(cells)} |")

    # By rounds, since a machine's speed wavers.
    ratios = [
        theirs[TRAINING] / ours[TRAINING]
        for theirs, ours in zip(*runs.values(), strict=True)
    ]
    print(f"\nTraining, textbook / this project: {spread(ratios, digits=2)}")


def spread(values, digits=1):
    """Return median [least-greatest] as a text."""
    median, least, greatest = (
        f"{value:,.{digits}f}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} [{least}-{greatest}]"


def main():
    parser = argparse.ArgumentParser(
        description="Measure the project beside the textbook.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--epochs", type=int, default=10, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each")
    parser.add_argument("--seed", type=int, default=0, help="of --textbook")
    parser.add_argument(
        "--textbook", action="store_true", help="train as the textbook does, once"
    )
    args = parser.parse_args()
    if args.textbook:
        textbook(args.device, args.epochs, args.seed)
    else:
        compare(args.device, args.epochs, args.rounds)


if __name__ == "__main__":
    main()
