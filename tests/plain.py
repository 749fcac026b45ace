"""The same recipe as a textbook would train it, to compare against: image by image, default Adam, .item() each step.

    python tests/plain.py --device cpu          the textbook's way
    python tests/plain.py --device cpu --workers 1      with the loader settings of PyTorch's own VAE example

Prints one line of JSON: the seconds of training and the held-out loss in nats an image. Shares no code with the
project's script, so that agreement between the two means something.
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


def plain_loss(recon_x, x, mu, logvar):
    bce = F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))
    return bce + kld


def plain_step(model, optimizer, x):
    optimizer.zero_grad()
    recon_x, mu, logvar = model(x)
    loss = plain_loss(recon_x, x, mu, logvar)
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def plain_held_out_loss(model, loader, device):
    total = 0.0
    for x, _ in loader:
        x = x.to(device)
        recon_x, mu, logvar = model(x)
        total += plain_loss(recon_x, x, mu, logvar).item()
    return total / len(loader.dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="loader processes; with any, CUDA memory is pinned too")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(options.seed)

    pin = options.workers > 0 and device.type == "cuda"
    settings = {"batch_size": 128, "num_workers": options.workers, "pin_memory": pin}
    transform = transforms.ToTensor()
    train_dataset = datasets.MNIST("data", train=True, transform=transform, download=True)
    test_dataset = datasets.MNIST("data", train=False, transform=transform)
    train_loader = DataLoader(train_dataset, shuffle=True, **settings)
    test_loader = DataLoader(test_dataset, **settings)
    model = PlainVAE().to(device)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)

    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        total = 0.0
        for x, _ in tqdm(train_loader, desc=f"Epoch {epoch}", mininterval=1):
            total += plain_step(model, optimizer, x.to(device))
        print(f"epoch {epoch}: {total / len(train_loader.dataset):.2f} nats an image")
    seconds = time.perf_counter() - start
    held_out = plain_held_out_loss(model, test_loader, device)
    print(json.dumps({"training_seconds": seconds, "held_out_loss": held_out}))


if __name__ == "__main__":
    main()
