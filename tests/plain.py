"""The same recipe as a textbook would train it: image by image, with default Adam and .item() at each step.

With --workers 1 it has the loader settings of PyTorch's own VAE example on a GPU. It shares no code with the script.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class PlainVAE(nn.Module):  # its layers are named as in the project's VAE, so that weights can be exchanged
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2_mu, self.fc2_logvar = nn.Linear(784, 400), nn.Linear(400, 2), nn.Linear(400, 2)
        self.fc3, self.fc4 = nn.Linear(2, 400), nn.Linear(400, 784)


def plain_loss(model, x):
    x = x.view(-1, 784)
    h = F.relu(model.fc1(x))
    mu, logvar = model.fc2_mu(h), model.fc2_logvar(h)
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    recon_x = torch.sigmoid(model.fc4(F.relu(model.fc3(z))))
    bce = F.binary_cross_entropy(recon_x, x, reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar))


def plain_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = plain_loss(model, x)
    loss.backward()
    optimizer.step()
    return loss.item()


def main():
    parser = argparse.ArgumentParser()
    for name, default in {"device": "cuda", "epochs": 10, "seed": 0, "workers": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    pin = options.workers > 0 and options.device.startswith("cuda")  # as the example does
    settings = {"batch_size": 128, "num_workers": options.workers, "pin_memory": pin}
    mnist = {"root": "data", "transform": transforms.ToTensor(), "download": True}
    train_loader = DataLoader(datasets.MNIST(train=True, **mnist), shuffle=True, **settings)
    test_loader = DataLoader(datasets.MNIST(train=False, **mnist), **settings)
    model = PlainVAE().to(options.device)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    start = time.perf_counter()
    for epoch in range(1, options.epochs + 1):
        total = sum(plain_step(model, optimizer, x.to(options.device)) for x, _ in train_loader)
        print(f"epoch {epoch}: {total / 60_000:.2f} nats per image")
    seconds = time.perf_counter() - start
    with torch.no_grad():
        held_out = sum(plain_loss(model, x.to(options.device)).item() for x, _ in test_loader)
    print(json.dumps({"training_seconds": seconds, "held_out_loss": {"total": held_out / 10_000}}))


if __name__ == "__main__":
    main()
