"""The Dream Generator: a variational autoencoder (VAE) that dreams handwritten digits.

    python quest_12_1.py                 train on a CUDA GPU, save dreams/dream_sample.png
    python quest_12_1.py --device cpu    the same without a GPU
    python quest_12_1.py --gallery       save four more pictures, the model, and a page to play with

The encoder maps each MNIST digit to a Gaussian over a plane; the decoder maps points to images.
Training maximises the variational bound (ELBO) of Kingma & Welling, "Auto-Encoding Variational
Bayes", 2013, arXiv:1312.6114. Then points drawn from a standard normal decode to new digits.

Ten epochs take 16 s with two threads on an Intel Xeon with AMX; no GPU has run this yet. The loss
(the bound, negated) ends at 154.3 nats per image on 10,000 held-out digits: mean of seeds 0 to 4.
"""

import argparse
import base64
import contextlib
import copy
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.utils import draw_keypoints, make_grid, save_image
from tqdm import tqdm

# ---- Settings ------------------------------------------------------------------------------------
SIDE = 28  # pixels, height and width of an image
PIXELS = SIDE * SIDE  # values in [0, 1] that make one image
HIDDEN = 400  # units per hidden layer: with 200 the loss is 2.0 nats higher, with 800 1.2 lower
LATENT_DIM = 2  # numbers in z, the code of an image: 2 make a plane, which can be drawn
# Training
DATASET = datasets.MNIST  # or datasets.FashionMNIST, datasets.KMNIST: the same format
DATA_DIR = "data"  # relative to the current directory
BETA = 1  # weight of KLD, the part of the loss that keeps codes near the middle of the plane
EPOCHS = 10  # passes over the training set (--epochs): after 20 the loss is 3.0 nats lower
BATCH_SIZE = 128  # images per step: 60,000 make 468 batches and a last one of 96
LEARNING_RATE = 1e-3  # of Adam
SEED = 0  # decides weights, batches, noise and dreams (--seed)
# Pictures
DREAMS_DIR = "dreams"  # relative to the current directory (--output)
TEMPLATE = "dreams/plane.html"  # of the gallery's page, relative to the current directory
SAMPLES = 64  # dreams in dream_sample.png
EXTENT = 4  # the gallery shows the plane from -EXTENT to EXTENT, in both directions,
CELLS = 20  # and what 20x20 points of it decode to
# RRGGBB of the classes 0 to 9, distinct on black for colour-blind eyes too:
COLOURS = "48a7ff fe8da8 f3d005 b4c9f4 50ffae 0489a1 9d50ff aba844 b46657 ff09b8".split()


# ---- Data ----------------------------------------------------------------------------------------
def load_data(root):
    """Return the training set and the held-out set from the folder `root`. Raises OSError."""
    transform = transforms.ToTensor()
    try:
        train_dataset = DATASET(root, train=True, download=True, transform=transform)
        test_dataset = DATASET(root, train=False, download=True, transform=transform)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, AssertionError) as error:
        folder = Path(root, DATASET.__name__).resolve()
        cure = "Run it in its clone's folder or online. Damaged MNIST: git checkout -- data/MNIST"
        raise OSError(f"{folder} can be neither read nor downloaded: {error!r}\n{cure}") from error
    return train_dataset, test_dataset


def images_on(device, dataset):
    """Return all N images of `dataset`, transformed once and for all: (N, PIXELS) on `device`."""
    if isinstance(dataset.transform, transforms.ToTensor):
        # It takes all N as the channels of one image: 0.1 s on a Xeon; one by one takes 2.2 s.
        images = dataset.transform(dataset.data.permute(1, 2, 0).numpy())
    else:
        images = torch.stack([image for image, _ in dataset])
    return images.flatten(1).to(device)


# ---- Model ---------------------------------------------------------------------------------------
class VAE(nn.Module):
    """Encoder and decoder, one hidden layer each: the paper's appendix C, but ReLU for its tanh."""

    def __init__(self, hidden=HIDDEN, latent_dim=LATENT_DIM):
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, hidden)
        self.fc2_mu = nn.Linear(hidden, latent_dim)
        self.fc2_logvar = nn.Linear(hidden, latent_dim)
        self.fc3 = nn.Linear(latent_dim, hidden)
        self.fc4 = nn.Linear(hidden, PIXELS)

    def encode(self, x):
        """Map x: (N, PIXELS) to mu, logvar: (N, latent_dim), of each image's Gaussian, q(z|x)."""
        h = F.relu(self.fc1(x))
        return self.fc2_mu(h), self.fc2_logvar(h)  # any logvar gives a variance above 0

    def reparameterize(self, mu, logvar, eps=None):
        """Draw z: (N, latent_dim) from N(mu, exp(logvar)), in a way that has a gradient.

        No gradient passes through a direct draw. Here the randomness is in eps alone, new unless
        given, so backpropagation reaches the encoder through mu and logvar (the paper's 2.4).
        """
        std = torch.exp(logvar / 2)  # the square root of the variance
        eps = torch.randn_like(std) if eps is None else eps
        return mu + std * eps

    def decode(self, z):
        """Map z: (N, latent_dim) to how probable white is in each pixel: (N, PIXELS) in [0, 1]."""
        h = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h))

    def forward(self, x, eps=None):
        """Map x: (N, PIXELS) or (N, 1, SIDE, SIDE) to recon_x: (N, PIXELS), mu and logvar."""
        mu, logvar = self.encode(x.flatten(1))
        z = self.reparameterize(mu, logvar, eps)
        return self.decode(z), mu, logvar


# ---- Loss, in nats (1 nat = 1.44 bits) -----------------------------------------------------------
def loss_terms(recon_x, x, mu, logvar, beta=BETA):
    """Return the loss and its parts, BCE and KLD, summed over the batch: three 0-dim tensors.

    BCE, the binary cross-entropy, is minus log p(x|z) for pixels drawn black or white, recon_x
    being how probable white is. For grey ones it is the average over drawings in which a grey of
    0.3 is white 3 times in 10: a perfect copy costs 46 nats, 0.5 everywhere costs PIXELS * ln 2 =
    543. KLD, the Kullback-Leibler divergence of q(z|x) from N(0, I), is 0 where mu = logvar = 0 and
    z says nothing about x. BCE pulls the codes of different images apart, KLD pulls them together.
    recon_x: (N, PIXELS) in [0, 1]; x: that or (N, 1, SIDE, SIDE); mu, logvar: (N, latent_dim).
    """
    bce = F.binary_cross_entropy(recon_x, x.flatten(1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())  # the paper's appendix B
    return bce + beta * kld, bce, kld


def loss_function(recon_x, x, mu, logvar, beta=BETA):
    """Return the summed loss: with beta = 1, minus the ELBO, estimated from one z for each x."""
    return loss_terms(recon_x, x, mu, logvar, beta)[0]


# ---- Learning ------------------------------------------------------------------------------------
def train_epoch(model, optimizer, train_loader, beta=BETA):
    """Take a step on each batch, (B, PIXELS); return the average loss in nats per image."""
    model.train()  # by custom, like eval() below: dropout and batch norm would need it
    total_loss, trained_on = 0.0, 0  # in nats, in images
    for x in train_loader:
        optimizer.zero_grad()
        recon_x, mu, logvar = model(x)
        loss = loss_function(recon_x, x, mu, logvar, beta)
        loss.backward()
        optimizer.step()
        total_loss += loss.detach()  # stays on the device: .item() would wait for it at each step
        trained_on += len(x)
    return total_loss.item() / trained_on


@torch.no_grad()
def evaluate(model, x_test, eps, beta=BETA):
    """Return loss, BCE and KLD in nats per image; x_test: (N, PIXELS), eps: (N, latent_dim)."""
    model.eval()
    recon_x, mu, logvar = model(x_test, eps)  # in one batch: 10,000 images take some 150 MB
    return (torch.stack(loss_terms(recon_x, x_test, mu, logvar, beta)) / len(x_test)).tolist()


@torch.no_grad()
def dream(model, z):
    """Decode z: (N, latent_dim) into images: (N, 1, SIDE, SIDE) in [0, 1]."""
    model.eval()
    return model.decode(z).view(-1, 1, SIDE, SIDE)


def learn(x_train, x_test, epochs=EPOCHS, seed=SEED, latent_dim=LATENT_DIM, beta=BETA):
    """Train a VAE on x_train: (N, PIXELS), on its device; evaluate it on x_test: (M, PIXELS).

    Returns the model; SAMPLES dreams before training and after each epoch; and each epoch's losses,
    in nats per image. Sets the process's seed. Raises FloatingPointError at NaN, if BCE has not.
    """
    torch.manual_seed(seed)
    model = VAE(latent_dim=latent_dim).to(x_train.device)
    optimizer = optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)  # all weights at once
    train_loader = DataLoader(x_train, batch_size=BATCH_SIZE, shuffle=True)  # of images alone
    generator = torch.Generator("cpu").manual_seed(seed)  # same z, eps on all devices, all epochs
    z = torch.randn(SAMPLES, latent_dim, generator=generator, device="cpu").to(x_train.device)
    eps = torch.randn(len(x_test), latent_dim, generator=generator, device="cpu").to(x_test.device)
    dreams = [dream(model, z)]
    losses = []
    for epoch in range(1, epochs + 1):
        title = f"Epoch {epoch}/{epochs}"
        train_loss = train_epoch(model, optimizer, tqdm(train_loader, title, leave=False), beta)
        loss, bce, kld = evaluate(model, x_test, eps, beta)
        if not math.isfinite(train_loss + loss):
            raise FloatingPointError(f"loss {train_loss}, held-out {loss}: lower LEARNING_RATE")
        report = f"loss {train_loss:.2f}, held-out loss {loss:.2f} nats per image"
        print(f"{title}: {report}", file=sys.stderr)
        losses.append({"train": train_loss, "held_out": loss, "bce": bce, "kld": kld})
        dreams.append(dream(model, z))
    return model, dreams, losses


# ==== The method ends here. What follows is the gallery, files and the command line ===============
def draw_codes(mu, targets, digits):
    """Return a picture of the plane: dots at mu: (N, 2), digits: (10, PIXELS) as their legend."""
    size = CELLS * (SIDE + 2) + 2
    scale = torch.tensor([1, -1]) * size / (2 * EXTENT)  # z1 grows to the right, z2 upwards
    picture = torch.zeros(3, size, size)
    for label, colour in enumerate(COLOURS):
        dots = size / 2 + scale * mu[targets == label]
        picture = draw_keypoints(picture, dots[None], colors=f"#{colour}", radius=1)
        rgb = torch.tensor(list(bytes.fromhex(colour))).view(3, 1, 1) / 255
        picture[:, :SIDE, SIDE * label : SIDE * (label + 1)] = rgb * digits[label].view(SIDE, SIDE)
    angle = torch.linspace(0, 2 * torch.pi, 181)
    circle = scale * torch.stack((angle.cos(), angle.sin()), dim=1)  # one standard deviation away
    circles = size / 2 + torch.stack((circle, 2 * circle, 3 * circle))
    return draw_keypoints(picture, circles, [(k, k + 1) for k in range(180)], radius=0, width=1)


def save_gallery(folder, template, model, x_test, dataset, dreams, run):
    """Save four pictures, the model and its page; model, x_test: on the CPU; dreams: by epoch."""
    exact = copy.deepcopy(model).double().requires_grad_(False)  # for pictures and the page
    mu, logvar = exact.encode(x_test.double())
    firsts = [(dataset.targets == label).nonzero()[:10] for label in range(len(COLOURS))]
    shown = torch.cat(firsts, dim=1).flatten()  # ten digits of each class: 0, 1, ..., 9, 0, 1, ...
    digits, recon_x = x_test[shown], exact.decode(mu[shown])
    centres = torch.linspace(-EXTENT, EXTENT, 2 * CELLS + 1, dtype=torch.double)[1::2]  # of cells
    points = torch.cartesian_prod(centres.flip(0), centres).flip(1)  # row by row, z2 falling
    save_image(dream(exact, points), f"{folder}/dream_canvas.png", nrow=CELLS)
    save_image(draw_codes(mu, dataset.targets, digits[:10]), f"{folder}/dream_codes.png")
    pairs = torch.cat((digits, recon_x), dim=1)[:40].view(-1, 1, 2 * SIDE, SIDE)
    save_image(pairs, f"{folder}/dream_mirror.png", nrow=10, padding=4, pad_value=0.35)
    frames = [transforms.functional.to_pil_image(make_grid(images)[0]) for images in dreams]
    times = {"duration": [500] * (len(frames) - 1) + [3000], "loop": 0}  # ms; for ever
    frames[0].save(f"{folder}/dream_growth.gif", save_all=True, append_images=frames[1:], **times)

    weights = model.state_dict()
    buffer = io.BytesIO()  # torch.save itself would not say that a disk is full
    torch.save(weights, buffer)
    Path(folder, "dream_model.pt").write_bytes(buffer.getvalue())
    tensors = {**weights, "digits": (255 * digits).round().byte(), "decoded": recon_x[0].float()}
    tensors["encoded"] = torch.cat((mu[shown[0]], logvar[shown[0]])).float()
    classes = [name.partition(" - ")[0] for name in dataset.classes]  # MNIST's are "0 - zero", ...
    plane = {"extent": EXTENT, "cells": CELLS, "colours": COLOURS, "classes": classes, "beta": BETA}
    codes = base64.b64encode(Path(folder, "dream_codes.png").read_bytes()).decode()
    data = {**run, **plane, "codes": codes, "tensors": tensors}
    text = json.dumps(data, default=lambda tensor: base64.b64encode(tensor.numpy()).decode())
    page = template.replace("const run = null;", f"const run = {text};")
    Path(folder, "dream_plane.html").write_text(page, encoding="utf-8")


# ---- Devices and files ---------------------------------------------------------------------------
def open_device(name):
    """Try the device `name` and make it current; return a GPU's full name. Raises OSError."""
    try:
        trial = torch.zeros(1, device=name)
        trial.item()  # waits for the device
        if trial.is_cuda:
            torch.cuda.set_device(trial.device)  # else Adam takes memory on the first GPU as well
        return torch.cuda.get_device_name() if trial.is_cuda else name
    except Exception as error:  # of many kinds: RuntimeError, AssertionError, ImportError, ...
        reason = str(error).partition("\n")[0][:300]
        cure = "By default, a CUDA GPU is required. Without one: python quest_12_1.py --device cpu"
        raise OSError(f"PyTorch cannot use the device '{name}': {reason}\n{cure}") from error


@contextlib.contextmanager
def atomic_writes(folder):
    """Yield a temporary folder inside `folder`; after the block, move its files into `folder`."""
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryDirectory(prefix=".part-", dir=folder, ignore_cleanup_errors=True) as part:
            yield part
            for name in os.listdir(part):
                os.replace(f"{part}/{name}", f"{folder}/{name}")  # atomic: the old or the whole new
    except OSError as error:
        raise OSError(f"not all can be saved in '{folder}' (--output): {error}") from error


# ---- Command line --------------------------------------------------------------------------------
def parse_arguments(argv):
    """Return the options, a namespace. Exits with 2, usage and reason if they make no sense."""
    parser = argparse.ArgumentParser(description="Let a VAE dream digits.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, cpu or mps (default: %(default)s)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the data (default: %(default)s)")
    add("--seed", type=int, default=SEED, help="of weights, order, noise (default: %(default)s)")
    add("--output", default=DREAMS_DIR, help="folder for all that is saved (default: %(default)s)")
    add("--gallery", action="store_true", help="save four more pictures, the model and its page")
    add("--json", action="store_true", help="print the result as one line of JSON")
    options = parser.parse_args(argv)
    if options.epochs < 1 or not 0 <= options.seed < 2**64:
        parser.error(f"--epochs must be at least 1 and --seed from 0 to {2**64 - 1}")
    if options.gallery and LATENT_DIM != 2:
        parser.error(f"--gallery draws a plane: it needs LATENT_DIM = 2, not {LATENT_DIM}")
    return options


def learn_and_dream(options):
    """Do the job of the command line; return its result, a dict. Raises OSError, and as `learn`."""
    name = open_device(options.device)
    if options.gallery and not Path(TEMPLATE).is_file():
        raise OSError(f"--gallery needs {Path(TEMPLATE).resolve()}: run it in its clone's folder.")
    template = Path(TEMPLATE).read_text(encoding="utf-8") if options.gallery else None
    train_dataset, test_dataset = load_data(DATA_DIR)
    x_train = images_on(options.device, train_dataset)
    x_test = images_on(options.device, test_dataset)
    with atomic_writes(options.output):
        pass  # a folder that cannot be written raises now, not after training

    start = time.perf_counter()
    model, dreams, losses = learn(x_train, x_test, options.epochs, options.seed, LATENT_DIM, BETA)
    seconds = time.perf_counter() - start
    run = {**vars(options), "device_name": name, "training_seconds": seconds, "losses": losses}
    with atomic_writes(options.output) as folder:
        sample = dreams[-1]
        save_image(sample, f"{folder}/dream_sample.png")
        if options.gallery:
            save_gallery(folder, template, model.cpu(), x_test.cpu(), test_dataset, dreams, run)
        files = [f"{options.output}/{file}" for file in sorted(os.listdir(folder))]
    _, loss, bce, kld = losses[-1].values()
    message = f"Trained in {seconds:.1f} s on {name}. Held-out loss: {loss:.2f} nats per "
    message += f"image, BCE {bce:.2f} + {BETA} x KLD {kld:.2f}. The dream is ready: "
    return {**run, "files": files, "message": message + ", ".join(files)}


def main(argv=None):
    """Run the command line `argv`, by default the process's own; return the exit code.

    It sets state of the process: the seed, the current GPU, and the three lines below.
    """
    options = parse_arguments(argv)
    # In 50 steps some 150 of fc1's 400 units die: x >= 0, so a step moves most weights of a unit
    # one way, and a few steps down make it 0 for all images. Harmless, but Adam's average of its
    # gradient decays to denormals, below 1e-38, slow on many CPUs: flushed, 0.83 of a Xeon's time.
    torch.set_flush_denormal(True)  # in this thread and those it starts
    # The CPU's matrix products by oneDNN, rounded to bfloat16 where the processor multiplies that:
    # 0.90 of the time on a Xeon with AMX and two threads, 0.79 with one; losses as without it.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.set_default_device(None)  # if a notebook has set one: the loader shuffles on the CPU
    try:
        result, exit_code = learn_and_dream(options), 0
    except KeyboardInterrupt:
        result, exit_code = {"message": "stopped by Ctrl-C."}, 130
    except (OSError, FloatingPointError) as error:
        result, exit_code = {"message": str(error)}, 1
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        of_gpu = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
        of_gpu |= message.startswith(("CUDA error: ", "MPS backend out of memory"))
        nan = "input should be between 0 and 1" in message or "device-side assert" in message
        if not (of_gpu or nan):
            raise  # a bug
        cause = ": most likely the loss is NaN, lower LEARNING_RATE" if nan else ""
        result, exit_code = {"message": message + cause}, 1
    if options.json:  # first, since standard error may be a full disk
        print(json.dumps({"success": exit_code == 0, **result}))
    elif exit_code == 0:
        print(result["message"])
    if exit_code != 0:
        print(f"quest_12_1.py: {result['message']}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
