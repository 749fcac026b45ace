"""The same recipe as a textbook would train it, to compare against: image by image, default Adam, .item() each step.

    python tests/plain.py --device cpu                  the textbook's way
    python tests/plain.py --device cpu --workers 1      with the loader settings of PyTorch's own VAE example

Prints the seconds of training and the held-out loss as JSON. Shares no code with the script: agreement means something.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm


class PlainVAE(nn.Module):
    """784 -> 400 -> 2 -> 400 -> 784, its layers named as in the project's VAE so that weights can be exchanged."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(784, 400)
        self.fc21 = nn.Linear(400, 2)
        self.fc22 = nn.Linear(400, 2)
        self.fc3 = nn.Linear(2, 400)
        self.fc4 = nn.Linear(400, 784)

    def forward(self, x):
        h = F.relu(self.fc1(x.view(-1, 784)))
        mu, logvar = self.fc21(h), self.fc22(h)
        std = torch.exp(0.5 * logvar)
        z = mu + std * torch.randn_like(std)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def plain_loss(model, x):
    recon_x, mu, logvar = model(x)
    bce = F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))


def plain_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = plain_loss(model, x)
    loss.backward()
    optimizer.step()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="loader processes; with any, CUDA memory is pinned too")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    pin = options.workers > 0 and options.device.startswith("cuda")
    settings = {"batch_size": 128, "num_workers": options.workers, "pin_memory": pin}
    transform = transforms.ToTensor()
    train_dataset = datasets.MNIST("data", train=True, transform=transform, download=True)
    test_dataset = datasets.MNIST("data", train=False, transform=transform)
    train_loader = DataLoader(train_dataset, shuffle=True, **settings)
    model = PlainVAE().to(options.device)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)

    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        total = sum(plain_step(model, optimizer, x.to(options.device)) for x, _ in tqdm(train_loader, mininterval=1))
        print(f"epoch {epoch}: {total / len(train_dataset):.2f} nats per image")
    seconds = time.perf_counter() - start
    with torch.no_grad():
        held_out = sum(plain_loss(model, x.to(options.device)).item() for x, _ in DataLoader(test_dataset, **settings))
    print(json.dumps({"training_seconds": seconds, "held_out_loss": {"total": held_out / len(test_dataset)}}))


if __name__ == "__main__":
    main()
