"""The recipe as a textbook trains it: image by image, default Adam, .item() at each step. No code of the script."""

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
    for name, default in {"device": "cuda", "epochs": 10, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train_dataset, test_dataset = (datasets.MNIST("data", train, transforms.ToTensor()) for train in (True, False))
    model = PlainVAE().to(options.device)
    optimizer = optim.Adam(model.parameters(), lr=1e-3)
    start = time.perf_counter()
    for _ in range(options.epochs):
        for x, _ in DataLoader(train_dataset, batch_size=128, shuffle=True):
            plain_step(model, optimizer, x.to(options.device))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        total = sum(plain_loss(model, x.to(options.device)).item() for x, _ in DataLoader(test_dataset, batch_size=128))
    print(json.dumps({"training_seconds": seconds, "losses": [{"held_out": total / len(test_dataset)}]}))


if __name__ == "__main__":
    main()
