"""The Dream Generator: a variational autoencoder (VAE) that dreams handwritten digits.

    python quest_12_1.py                 train on a CUDA GPU, save dreams/dream_sample.png
    python quest_12_1.py --device cpu    the same without a GPU
    python quest_12_1.py --gallery       save four more pictures, the model, and a page to play with

The encoder maps each MNIST digit x to a small cloud in a plane, a Gaussian q(z|x); the decoder maps
a point z of it to p(x|z), how probable white is in each pixel: an image. Training raises a lower
bound of log p(x), p(x) being the average of p(x|z) over z from a standard normal: the evidence
lower bound (ELBO) of Kingma & Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114.
The bound keeps the clouds near that normal, so points drawn from it decode to new digits.

Ten epochs take 2 to 3 s on an NVIDIA H100, 16 s on two cores of a Xeon with AMX, where the loss,
the negative bound, ends at 154.3 nats per held-out image (five seeds). Needs PyTorch 2.11 or newer.
"""

import argparse
import base64
import functools
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

SIDE = 28  # pixels, height and width of an image in MNIST's format
PIXELS = SIDE * SIDE  # values in [0, 1] that make one image

# ---- Settings: `main` reads them when it runs and hands them on; defaults are fixed on import ----
HIDDEN = 400  # units per hidden layer: with 200 the loss is 2 nats higher, with 800 about 1 lower
LATENT_DIM = 2  # numbers in z, the code of an image: 2 make a plane, which can be drawn
DATASET = datasets.MNIST  # or datasets.FashionMNIST, datasets.KMNIST: the same format
DATA_DIR = "data"  # relative to the current directory
BETA = 1  # weight of KLD (see loss_terms), which keeps codes near the middle of the plane
EPOCHS = 10  # passes over the training set (--epochs): after 20 the loss is 3.0 nats lower
BATCH_SIZE = 128  # images per step: 60,000 make 468 batches and a last one of 96
LEARNING_RATE = 1e-3  # of Adam: its usual one
SEED = 0  # decides weights, batches, noise and dreams (--seed)
SAMPLES = 64  # dreams in dream_sample.png


# ---- Data ----------------------------------------------------------------------------------------
def load_data(root, dataset=DATASET):
    """Return the training set and the held-out set; what `root` lacks is downloaded into it."""
    transform = transforms.ToTensor()
    train_dataset = dataset(root, train=True, download=True, transform=transform)
    test_dataset = dataset(root, train=False, download=True, transform=transform)
    return train_dataset, test_dataset


def images_on(device, dataset):
    """Return all N images of `dataset`, transformed once and for all: (N, PIXELS) on `device`."""
    if isinstance(dataset.transform, transforms.ToTensor):  # 0.1 s: all N at once, as the
        images = dataset.transform(dataset.data.permute(1, 2, 0).numpy())  # channels of one image
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
        """Map x: (N, PIXELS) to mu, logvar: (N, latent_dim), of q(z|x), the Gaussian of x's z."""
        h = F.relu(self.fc1(x))
        return self.fc2_mu(h), self.fc2_logvar(h)  # any logvar gives a variance, exp(logvar), > 0

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
        """Map x: (N, PIXELS) or (N, 1, SIDE, SIDE), and the noise eps, to recon_x, mu, logvar."""
        mu, logvar = self.encode(x.flatten(1))
        z = self.reparameterize(mu, logvar, eps)  # one z per x: its gradient is right on average
        # NaN must not reach BCE, whose check for it can crash a GPU's process. KLD shows it.
        z = z.masked_fill(~(z.abs() < 1e9), 0)  # a NaN is not < 1e9, nor is what overflows
        return self.decode(z), mu, logvar


# ---- Loss, in nats (1 nat = 1.44 bits) -----------------------------------------------------------
def loss_terms(recon_x, x, mu, logvar, beta=BETA):
    """Return the loss and its parts, BCE and KLD, summed over the batch: three 0-dim tensors.

    recon_x: (N, PIXELS) in [0, 1]; x: that or (N, 1, SIDE, SIDE); mu, logvar: (N, latent_dim).
    BCE, the binary cross-entropy, is minus log p(x|z) for pixels drawn black or white, recon_x
    being how probable white is. For grey ones it is the average over drawings in which a grey of
    0.3 is white 3 times in 10: a perfect copy costs 46 nats, 0.5 everywhere costs PIXELS * ln 2 =
    543. KLD, the Kullback-Leibler divergence of q(z|x) from N(0, I), is 0 if mu = logvar = 0, where
    z says nothing about x. BCE pulls the codes of different images apart, KLD pulls them together.
    """
    bce = F.binary_cross_entropy(recon_x, x.flatten(1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())  # the paper's appendix B
    return bce + beta * kld, bce, kld


def loss_function(recon_x, x, mu, logvar, beta=BETA):
    """Return the summed loss: with beta = 1, an estimate of -ELBO, which is >= -log p(x)."""
    return loss_terms(recon_x, x, mu, logvar, beta)[0]


# ---- Learning ------------------------------------------------------------------------------------
def train_step(model, optimizer, x, beta=BETA):
    """Take a step on the batch x: (B, PIXELS); return its summed loss in nats, a 0-dim tensor."""
    optimizer.zero_grad()
    recon_x, mu, logvar = model(x)
    loss = loss_function(recon_x, x, mu, logvar, beta)
    loss.backward()  # of a sum: Adam ignores its gradient's scale, SGD would need loss / len(x)
    optimizer.step()
    return loss.detach()  # its value, without the record of how it was computed


def train_epoch(model, optimizer, train_loader, beta=BETA):
    """Take a step on each batch, (B, PIXELS); return the average loss in nats per image."""
    model.train()  # by custom, like eval() below: dropout and batch norm would need it
    step = functools.partial(train_step, model, optimizer, beta=beta)
    if next(model.parameters()).is_cuda:  # to print or debug in a step, take out these two lines
        step = CapturedStep(step)  # does the same, faster: below
    total_loss, trained_on = 0.0, 0  # in nats, in images
    for x in train_loader:
        total_loss += step(x)  # stays on the GPU: .item() would wait for it at each step
        trained_on += len(x)
    return total_loss.item() / trained_on


@torch.no_grad()
def evaluate(model, x_test, eps, beta=BETA):
    """Return loss, BCE and KLD in nats per image; x_test: (N, PIXELS), eps: (N, latent_dim)."""
    model.eval()
    recon_x, mu, logvar = model(x_test, eps)  # in one batch: for 10,000 images 79 MB of memory
    return (torch.stack(loss_terms(recon_x, x_test, mu, logvar, beta)) / len(x_test)).tolist()


@torch.no_grad()
def dream(model, z):
    """Decode z: (N, latent_dim) into images: (N, 1, SIDE, SIDE) in [0, 1]."""
    model.eval()
    return model.decode(z).view(-1, 1, SIDE, SIDE)


def learn(x_train, x_test, epochs=EPOCHS, seed=SEED, hidden=HIDDEN, latent_dim=LATENT_DIM,
          beta=BETA, batch_size=BATCH_SIZE, lr=LEARNING_RATE, samples=SAMPLES):  # fmt: skip
    """Train a VAE on x_train: (N, PIXELS), on its device; evaluate it on x_test: (M, PIXELS).

    Returns the model; `samples` dreams before training and after each epoch; and each epoch's
    losses, in nats per image. Sets PyTorch's seed, and no other state of the process. Raises
    FloatingPointError if the loss is not finite.
    """
    torch.manual_seed(seed)
    model = VAE(hidden, latent_dim).to(x_train.device)
    # fused: one pass updates the weights. capturable: CapturedStep may record it. Nothing more.
    optimizer = optim.Adam(model.parameters(), lr=lr, fused=True, capturable=True)
    train_loader = DataLoader(x_train, batch_size=batch_size, shuffle=True)  # x alone, no labels
    # z of the dreams and eps of the evaluation are the same on all devices and after each epoch:
    # what differs is the model alone.
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(samples, latent_dim, generator=generator).to(x_train.device)
    eps = torch.randn(len(x_test), latent_dim, generator=generator).to(x_test.device)
    dreams, losses = [dream(model, z)], []
    for epoch in range(1, epochs + 1):
        tag = f"Epoch {epoch}/{epochs}"
        train_loss = train_epoch(model, optimizer, tqdm(train_loader, tag, leave=False), beta)
        loss, bce, kld = evaluate(model, x_test, eps, beta)
        if not math.isfinite(train_loss + loss):
            raise FloatingPointError(f"loss {train_loss}, held-out {loss}: lower LEARNING_RATE")
        sys.stderr.write(f"{tag}: loss {train_loss:.2f}, held-out loss {loss:.2f} nats per image\n")
        losses.append({"train": train_loss, "held_out": loss, "bce": bce, "kld": kld})
        dreams.append(dream(model, z))
    return model, dreams, losses


# ==== The method ends here. What follows makes it fast on a GPU, draws, saves and reads options ===
class CapturedStep:
    """Do what step(x) does, on the current CUDA GPU: recorded as a CUDA graph, then replayed.

    A CUDA graph is a list of the GPU's operations that is started as a whole. A step has 76 short
    ones: an H100 computes them in 0.3 ms, but its CPU takes 1.9 ms to start them one by one. A
    replay gives what step(x) would give, bit for bit; PyTorch gives it new noise. But Python does
    not run in it. So each batch is copied to where the recorded one was; the loss is to be read
    before the next replay overwrites it; and a Python number that changes later, as beta or the
    learning rate may, has no effect on replays until the next epoch records anew.
    """

    def __init__(self, step):
        self.step = step
        self.x = self.graph = self.loss = None

    def __call__(self, x):
        if self.x is None:  # the first batch: libraries get ready, which cannot be recorded
            self.x = x.clone()
            return self.step(x)
        if x.shape != self.x.shape:  # a smaller last one, which the graph cannot take
            return self.step(x)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.step(self.x)  # recorded, not done: the replay does it
        self.x.copy_(x)
        self.graph.replay()
        return self.loss


# ---- The gallery ---------------------------------------------------------------------------------
EXTENT = 4  # it shows the plane from -EXTENT to EXTENT, in both directions
CELLS = 20  # points in each direction at which the canvas shows what the decoder draws
# RRGGBB of ten classes, chosen to be distinct on black, for colour-blind eyes too:
COLOURS = "48a7ff fe8da8 f3d005 b4c9f4 50ffae 0489a1 9d50ff aba844 b46657 ff09b8".split()
NO_RUN = "const run = null;"  # the template's line that the page replaces by what it shows


def draw_codes(mu, targets, digits, size):
    """Draw each code mu: (N, 2) in the colour of its class; digits: (10, PIXELS) are the legend."""
    dots = size / 2 + mu * torch.tensor([1, -1]) * size / (2 * EXTENT)  # z2 grows upwards
    picture = torch.zeros(3, size, size)
    for part, labels in zip(dots.split(500), targets.split(500)):  # in turn: no class hides others
        for k, rgb in enumerate(COLOURS):
            picture = draw_keypoints(picture, part[None, labels == k], colors=f"#{rgb}", radius=1)
    colours = torch.tensor([list(bytes.fromhex(rgb)) for rgb in COLOURS]).view(-1, 3, 1, 1) / 255
    legend = colours * digits.view(-1, 1, SIDE, SIDE)
    picture[:, :SIDE, : len(COLOURS) * SIDE] = make_grid(legend, nrow=len(COLOURS), padding=0)
    return picture


@torch.no_grad()
def save_pictures(folder, model, x_test, targets, digits, dreams):
    """Save four pictures of the model: of the plane, of x_test in it, of 40 digits, of learning."""
    centres = torch.linspace(-EXTENT, EXTENT, 2 * CELLS + 1)[1::2]  # of the canvas's cells
    z1, z2 = torch.meshgrid(centres, -centres, indexing="xy")  # z1 grows in a row, z2 falls by row
    canvas = make_grid(dream(model, torch.stack((z1, z2), dim=2).view(-1, 2)), nrow=CELLS)
    save_image(canvas, f"{folder}/dream_canvas.png")
    codes = draw_codes(model.encode(x_test)[0], targets, digits[:10], size=canvas.shape[-1])
    save_image(codes, f"{folder}/dream_codes.png")
    recon_x = model.decode(model.encode(digits)[0])  # of mu, without noise
    pairs = torch.cat((digits, recon_x), dim=1)[:40].view(-1, 1, 2 * SIDE, SIDE)
    save_image(pairs, f"{folder}/dream_mirror.png", nrow=10, padding=4, pad_value=0.35)
    frames = [transforms.functional.to_pil_image(make_grid(images)[0]) for images in dreams]
    times = {"duration": [500] * (len(frames) - 1) + [3000], "loop": 0}  # in ms; 0: loops for ever
    frames[0].save(f"{folder}/dream_growth.gif", save_all=True, append_images=frames[1:], **times)


@torch.no_grad()
def save_page(folder, template, model, digits, run):
    """Save the page: it shows `run`, the model, digits: (100, PIXELS) and the picture of codes."""
    mu, logvar = model.encode(digits[:1])
    # One image as PyTorch encodes and decodes it: with it the page checks what it computes.
    example = {"encoded": torch.cat((mu, logvar)), "decoded": model.decode(mu)}
    tensors = {**model.state_dict(), **example, "digits": (255 * digits).round().byte()}
    codes = base64.b64encode(Path(folder, "dream_codes.png").read_bytes()).decode()
    run = {**run, "extent": EXTENT, "cells": CELLS, "codes": codes, "tensors": tensors}
    text = json.dumps(run, default=lambda tensor: base64.b64encode(tensor.numpy()).decode())
    page = template.replace(NO_RUN, f"const run = {text};")
    Path(folder, "dream_plane.html").write_text(page, encoding="utf-8")


# ---- Devices, files and the command line ---------------------------------------------------------
def open_device(name):
    """Try the device `name` and make it current; return a GPU's full name. Raises OSError."""
    try:
        trial = torch.zeros(1, device=name)
        trial.item()  # waits for the device
        if trial.is_cuda:
            torch.cuda.set_device(trial.device)  # on which CapturedStep records
        return torch.cuda.get_device_name() if trial.is_cuda else name
    except Exception as error:  # of many kinds: RuntimeError, AssertionError, ImportError, ...
        cure = "By default, a CUDA GPU is required. Without one: python quest_12_1.py --device cpu"
        raise OSError(f"{cure}. PyTorch cannot use the device '{name}': {error}") from error


def run_job(args):
    """Learn, dream, save; return the result, a dict. Leaves denormals flushed and the seed set."""
    # Units that die (150 of fc1's 400 in 50 steps) leave denormals in Adam's averages, slow on many
    # CPUs. Flushed to 0, in this thread and those it starts, for good: 0.83 of a Xeon's time.
    torch.set_flush_denormal(True)
    device_name = open_device(args.device)
    path = Path("dreams/plane.html").resolve()  # the gallery's page, without a model
    template = path.read_text("utf-8") if args.gallery and path.is_file() else ""
    if args.gallery and NO_RUN not in template:
        raise OSError(f"--gallery needs {path}, unchanged (git checkout), in its clone's folder.")
    try:
        train_dataset, test_dataset = load_data(DATA_DIR, DATASET)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, AssertionError) as error:
        folder = Path(DATA_DIR, DATASET.__name__).resolve()
        cure = "Run it in its clone's folder or online. Damaged MNIST: git checkout -- data/MNIST."
        raise OSError(f"{folder} can be neither read nor downloaded. {cure} {error!r}") from error
    x_train, x_test = (images_on(args.device, part) for part in (train_dataset, test_dataset))
    os.makedirs(args.output, exist_ok=True)
    temporary = {"prefix": ".part-", "dir": args.output, "ignore_cleanup_errors": True}
    TemporaryDirectory(**temporary).cleanup()  # a read-only folder raises now, not after training

    sizes = {"hidden": HIDDEN, "latent_dim": LATENT_DIM, "samples": SAMPLES}
    recipe = {"beta": BETA, "batch_size": BATCH_SIZE, "lr": LEARNING_RATE}
    # oneDNN rounds the inputs of matrix products to bfloat16: 0.90 of the time on Xeons with AMX, a
    # loss within 0.3 nats. Without instructions for bfloat16 it rounds nothing and takes 1.1.
    precision = "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "none"
    with torch.backends.mkldnn.flags(enabled=True, allow_tf32=None, fp32_precision=precision):
        start = time.perf_counter()
        model, dreams, losses = learn(x_train, x_test, args.epochs, args.seed, **sizes, **recipe)
        seconds, last = time.perf_counter() - start, losses[-1]
    with TemporaryDirectory(**temporary) as folder:
        save_image(dreams[-1], f"{folder}/dream_sample.png")
        if args.gallery:
            model, x_test, targets = model.cpu(), x_test.cpu(), test_dataset.targets
            ten = [(targets == k).nonzero()[:10] for k in range(10)]
            digits = x_test[torch.cat(ten, dim=1).flatten()]  # ten of each class: 0, 1, ..., 9, 0
            save_pictures(folder, model, x_test, targets, digits, dreams)
            torch.save(model.state_dict(), f"{folder}/dream_model.pt")
            run = {"seed": args.seed, "epochs": args.epochs, "beta": BETA, **last}
            save_page(folder, template, model, digits, run)
        files = [f"{args.output}/{name}" for name in sorted(os.listdir(folder))]
        for file in files:
            os.replace(f"{folder}/{os.path.basename(file)}", file)  # atomic: the old or the new one
    message = f"Trained in {seconds:.1f} s on {device_name}. Held-out loss: {last['held_out']:.2f} "
    message += f"nats per image, BCE {last['bce']:.2f} + {BETA} x KLD {last['kld']:.2f}. "
    message += f"The dream is ready: {', '.join(files)}"
    result = {**vars(args), "device_name": device_name, "training_seconds": seconds}
    return {**result, "losses": losses, "files": files, "message": message}


def main(argv=None):
    """Run the command line `argv`, by default the process's own; return the exit code."""
    parser = argparse.ArgumentParser(description="Let a VAE dream digits.", allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, cpu or mps (default: %(default)s)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the data (default: %(default)s)")
    add("--seed", type=int, default=SEED, help="of weights, order, noise (default: %(default)s)")
    add("--output", default="dreams", help="folder for all that is saved (default: %(default)s)")
    add("--gallery", action="store_true", help="save four more pictures, the model and its page")
    add("--json", action="store_true", help="print the result as one line of JSON")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not 0 <= args.seed < 2**53:  # a larger one is rounded by many readers of JSON
        parser.error(f"--seed must be from 0 to {2**53 - 1}")
    if args.gallery and LATENT_DIM != 2:
        parser.error(f"--gallery draws a plane: it needs LATENT_DIM = 2, not {LATENT_DIM}")
    try:
        result, exit_code = run_job(args), 0
    except KeyboardInterrupt:
        result, exit_code = {"message": "stopped by Ctrl-C."}, 130
    except (OSError, FloatingPointError, RuntimeError) as error:
        message = str(error).partition("\n")[0][:500]  # PyTorch's go on for a page
        expected = (OSError, FloatingPointError, torch.OutOfMemoryError, torch.AcceleratorError)
        if not (isinstance(error, expected) or message.startswith(("CUDA error", "MPS backend"))):
            raise  # a bug
        result, exit_code = {"message": message}, 1
    line = json.dumps({"success": exit_code == 0, **result}) if args.json else result["message"]
    if args.json or exit_code == 0:
        sys.stdout.write(f"{line}\n")  # in one write, and before standard error, which may be full
    if exit_code != 0:
        sys.stderr.write(f"quest_12_1.py: {result['message']}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
