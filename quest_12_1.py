"""The Dream Generator: a variational autoencoder that learns MNIST's digits in a plane and dreams new ones.

    python quest_12_1.py                    train on a CUDA GPU, save dreams/dream_sample.png
    python quest_12_1.py --device cpu       the same without a GPU
    python quest_12_1.py --gallery          four more pictures: the plane, reconstructions, the atlas, the history

The encoder presses each digit into a Gaussian over two numbers, the decoder projects points of that plane back to
images, and training maximises the evidence lower bound (ELBO): Kingma & Welling, "Auto-Encoding Variational Bayes",
2013, arXiv:1312.6114. Without a GPU, on two cores of an AMD EPYC with torch 2.14.1, ten epochs train in 16 s to a
held-out loss of 154 nats an image, where the textbook's loop takes 36 s.
"""

import argparse
import contextlib
import errno
import http.client
import io
import json
import math
import os
import shutil
import signal
import socket
import sys
import textwrap
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # torchvision brings Pillow
from torch import nn, optim
from torch.utils.data import DataLoader, Sampler
from torchvision import datasets, transforms
from torchvision.datasets.utils import check_integrity
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

try:
    import fcntl  # file locks; Windows has none of this kind and runs without
except ImportError:
    fcntl = None

# ---------------------------------------------------------------------------------------------------------------------
# Recipe
# ---------------------------------------------------------------------------------------------------------------------

SIDE = 28  # pixels, height and width of a digit
PIXELS = SIDE * SIDE  # values in [0, 1] that make one input
HIDDEN = 400  # units in the one hidden layer of the encoder, and of the decoder
LATENT_DIM = 2  # coordinates of the plane
EPOCHS = 10  # passes over the 60,000 training digits
BATCH_SIZE = 128  # digits a step: 468 full batches and a last one of 96, none dropped
LEARNING_RATE = 1e-3  # Adam's; its other settings stay at their defaults
SEED = 0  # decides weights, batches, noise and dreams
SAMPLES = 64  # digits dreamed into dream_sample.png ...
SAMPLE_COLUMNS = 8  # ... in rows of this many
DATA_DIR = "data"  # both folders belong to the working folder
DREAMS_DIR = "dreams"

# ---------------------------------------------------------------------------------------------------------------------
# Data: MNIST, checked, then kept whole on the training device
# ---------------------------------------------------------------------------------------------------------------------

UNPACKED_MD5 = {  # torchvision checks the .gz files' sums, but never those of what it unpacked
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
NETWORK_TIMEOUT = 5  # seconds for each address of a server to answer; a name may have eight


class MNIST(datasets.MNIST):
    """torchvision's MNIST, blind to the `processed` tensors of versions before 0.9, whose sums nobody knows.

    torchvision looks for the files below a folder of the class's own name, so the name must stay.
    """

    processed_folder = ""


def load_mnist(root):
    """Return (train_dataset, test_dataset), torchvision MNIST datasets of 60,000 and 10,000 digits below `root`.

    Files that are missing or whose MD5 sum is wrong are unpacked, or downloaded, anew. Sound files are only read, so
    a folder that cannot be written will do. Raises DreamError where the digits cannot be had whole.
    """
    raw = os.path.join(root, "MNIST", "raw")
    try:
        if faulty(raw, UNPACKED_MD5):
            os.makedirs(raw, exist_ok=True)
            with exclusive(raw):
                broken = faulty(raw, UNPACKED_MD5)  # another process may have mended them while this one waited
                for name in broken:
                    if os.path.exists(os.path.join(raw, name)):
                        print(f"{raw}/{name} is damaged (wrong MD5 sum): unpacking it again.", file=sys.stderr)
                if broken:
                    unpack_mnist(raw)
        transform = transforms.ToTensor()
        return MNIST(root, train=True, transform=transform), MNIST(root, train=False, transform=transform)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:  # disk, torchvision, proxy, server
        lacking = ", ".join(faulty(raw, dict(MNIST.resources)))
        raise DreamError(
            f"MNIST could be neither read from ./{root} (in {os.getcwd()}) nor downloaded.\n"
            + (f"Missing or damaged: {lacking}\n" if lacking else "")
            + f"Reason: {' '.join(str(error).split())}\n"
            f"What to do: run where {root} is, or put MNIST's four .gz files into {raw} (in a git clone: "
            f"git checkout -- {root}), or connect to the network; then run again."
        ) from error


def faulty(folder, md5_sums):
    """The names in {name: MD5 sum} whose files in `folder` are missing, unreadable or not what the sum says."""

    def sound(name):
        with contextlib.suppress(OSError):
            return check_integrity(os.path.join(folder, name), md5_sums[name])

    return [name for name in md5_sums if not sound(name)]


def unpack_mnist(raw):
    """Have torchvision check, download where it must, and unpack MNIST's four files in private, then move them in.

    Whatever kills the process, each file in `raw` is the old one or the whole new one, and the next call sweeps up.
    """
    private = os.path.join(raw, ".unpacking")
    private_raw = os.path.join(private, "MNIST", "raw")
    shutil.rmtree(private, ignore_errors=True)
    os.makedirs(private_raw)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        archives = dict(MNIST.resources)
        for name in archives.keys() - faulty(raw, archives):
            shutil.copyfile(os.path.join(raw, name), os.path.join(private_raw, name))
        MNIST(private, download=True)
        for name in os.listdir(private_raw):
            os.replace(os.path.join(private_raw, name), os.path.join(raw, name))
    finally:
        socket.setdefaulttimeout(timeout)
        shutil.rmtree(private, ignore_errors=True)


def pixels_of(dataset, device):
    """Return all N images of an MNIST dataset as one (N, 784) float tensor in [0, 1] on `device`.

    The dataset's transform runs once for the whole set, not once an image in every epoch: ToTensor takes (H, W, C), and
    the N images pass as the channels of one.
    """
    images = dataset.transform(dataset.data.numpy().transpose(1, 2, 0))
    return images.view(-1, PIXELS).to(device)


class ShuffledBatches(Sampler):
    """The indices of x (N, ...) in a new random order each epoch, as index tensors of `batch_size` on x's device.

    With them a DataLoader gathers a batch in one indexing operation, and within an epoch a GPU waits for nothing.
    """

    def __init__(self, x, batch_size):
        self.size, self.device, self.batch_size = len(x), x.device, batch_size

    def __len__(self):
        return math.ceil(self.size / self.batch_size)

    def __iter__(self):
        yield from torch.randperm(self.size).to(self.device).split(self.batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class VAE(nn.Module):
    """The autoencoder of Kingma & Welling's appendix C: one hidden layer each way, Bernoulli pixels.

    x: (N, 784) in [0, 1]; mu, logvar and z: (N, 2). 631,188 parameters.
    """

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, HIDDEN)
        self.fc21 = nn.Linear(HIDDEN, LATENT_DIM)
        self.fc22 = nn.Linear(HIDDEN, LATENT_DIM)
        self.fc3 = nn.Linear(LATENT_DIM, HIDDEN)
        self.fc4 = nn.Linear(HIDDEN, PIXELS)

    def encode(self, x):
        """x (N, 784) -> mu (N, 2), logvar (N, 2): the Gaussian q(z|x) of each digit."""
        hidden = F.relu(self.fc1(x))
        return self.fc21(hidden), self.fc22(hidden)

    def reparameterize(self, mu, logvar, generator=None):
        """Draw z (N, 2) from N(mu, exp(logvar)) so that gradients reach both: the noise comes from outside.

        `generator`: a torch.Generator on mu's device; by default PyTorch's own.
        """
        eps = torch.randn(mu.shape, generator=generator, dtype=mu.dtype, device=mu.device)
        return mu + torch.exp(logvar / 2) * eps

    def decode(self, z):
        """z (N, 2) -> the mean of each pixel, (N, 784) in [0, 1]."""
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        """x (N, 784) or (N, 1, 28, 28) -> recon_x (N, 784), mu (N, 2), logvar (N, 2)."""
        mu, logvar = self.encode(x.view(-1, PIXELS))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


# ---------------------------------------------------------------------------------------------------------------------
# Loss: the negative ELBO, in nats
# ---------------------------------------------------------------------------------------------------------------------


class BinaryCrossEntropy(torch.autograd.Function):
    """F.binary_cross_entropy(recon_x, x, reduction="sum"), with log(1 - p) where PyTorch computes log1p(-p).

    PyTorch's is slow on CPUs: sigmoid, loss and their gradients took 0.75 ms a step on 2 cores, with this one 0.20 ms.
    Like PyTorch's, the logarithms stop at -100 and the gradient's denominator at 1e-12: a pixel at 0 or 1 stays finite.
    x is data: it gets no gradient. Raises ValueError where the shapes differ.
    """

    @staticmethod
    def forward(ctx, recon_x, x):
        if recon_x.shape != x.shape:
            raise ValueError(f"recon_x is {tuple(recon_x.shape)}, but x is {tuple(x.shape)}")
        ctx.save_for_backward(recon_x, x)
        log_p = torch.log(recon_x).clamp_(min=-100)
        log_not_p = torch.log(1 - recon_x).clamp_(min=-100)
        return -torch.lerp(log_not_p, log_p, x).sum()

    @staticmethod
    def backward(ctx, grad_output):
        recon_x, x = ctx.saved_tensors
        variance = ((1 - recon_x) * recon_x).clamp_(min=1e-12)
        return (recon_x - x).div_(variance).mul_(grad_output), None


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, I)) summed over the batch, 0-dim, in nats: Kingma & Welling's appendix B."""
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def loss_function(recon_x, x, mu, logvar):
    """The batch's loss: reconstruction error (BCE) plus regularisation (KLD), a 0-dim tensor, in nats.

    recon_x: (N, 784) in [0, 1]; x: (N, 784) or (N, 1, 28, 28) in [0, 1]; mu, logvar: (N, 2).
    """
    bce = BinaryCrossEntropy.apply(recon_x, x.view(-1, PIXELS))
    return bce + kl_divergence(mu, logvar)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """An average loss in nats an image, in its two parts."""

    bce: float
    kld: float

    @property
    def total(self):
        return self.bce + self.kld

    def __str__(self):
        return f"{self.total:.2f} nats an image (BCE {self.bce:.2f} + KLD {self.kld:.2f})"


def average_loss(loss, mu, logvar):
    """The Loss an image, given the summed `loss` of all N images (0-dim) and their mu and logvar (N, 2).

    Reads the numbers off the device, and so waits for it. Raises DreamError where they are NaN or infinite.
    """
    kld = kl_divergence(mu, logvar)
    bce_sum, kld_sum = torch.stack((loss - kld, kld)).tolist()
    if not math.isfinite(bce_sum + kld_sum):
        raise DreamError(f"training diverged: the loss is {bce_sum + kld_sum}. No picture was saved.")
    return Loss(bce_sum / len(mu), kld_sum / len(mu))


def train_step(model, optimizer, x):
    """Update the model on one batch x (N, 784); return its loss (0-dim), mu and logvar (N, 2), still on the device."""
    optimizer.zero_grad()
    recon_x, mu, logvar = model(x)
    loss = loss_function(recon_x, x, mu, logvar)
    loss.backward()
    optimizer.step()
    return loss.detach(), mu.detach(), logvar.detach()


def train_epoch(model, optimizer, train_loader, title):
    """Train on every batch once, under a progress bar with this title; return the average Loss on the way."""
    model.train()
    steps = []
    with tqdm(total=len(train_loader), desc=title, unit="batch") as bar:
        for x in train_loader:
            steps.append(train_step(model, optimizer, x))
            bar.update()
        losses, mus, logvars = zip(*steps)  # read only now: nothing within the epoch waits for the device
        average = average_loss(torch.stack(losses).sum(), torch.cat(mus), torch.cat(logvars))
        bar.set_postfix_str(f"loss {average}")
    return average


@torch.no_grad()
def evaluate(model, x, seed):
    """Return the average Loss on the digits x (N, 784), with one draw of z each, decided by `seed` alone."""
    model.eval()
    mu, logvar = model.encode(x)
    z = model.reparameterize(mu, logvar, torch.Generator(x.device).manual_seed(seed))
    return average_loss(loss_function(model.decode(z), x, mu, logvar), mu, logvar)


# ---------------------------------------------------------------------------------------------------------------------
# Dreaming: the sample, and the gallery
# ---------------------------------------------------------------------------------------------------------------------

CANVAS_SIDE = 20  # the canvas of dreams shows this many points along each axis of the plane
MIRROR_EACH = 4  # held-out digits of each class shown beside their reconstructions
CLASS_COLOURS = (  # ten that stay distinct for colour-blind eyes: P. Tol's "muted" scheme, with black for its grey
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#000000",
)  # fmt: skip
LIGHT_CLASSES = {1, 2, 4, 5}  # whose colours want dark letters
INK, RULE, PAPER = "#222222", "#DDDDDD", "#FFFFFF"
CURVE_COLOURS = ("#332288", "#CC6677")  # training, held-out


@torch.no_grad()
def dream(model, device):
    """Decode 64 draws z from N(0, I): what the model believes digits look like. Returns (64, 784) in [0, 1]."""
    model.eval()
    z = torch.randn(SAMPLES, LATENT_DIM, device=device)
    sample = model.decode(z)
    return sample


def canvas_points():
    """The centres of 20 x 20 cells of equal probability under N(0, I), (400, 2), row by row from the upper left.

    z1 grows to the right and z2 upwards, as in the atlas.
    """
    quantiles = torch.special.ndtri((torch.arange(CANVAS_SIDE) + 0.5) / CANVAS_SIDE)
    z2, z1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack((z1, z2), dim=-1).view(-1, LATENT_DIM)


def mirror_indices(targets):
    """Where the first 4 digits of each class stand in `targets` (N,): (40,), classes in turn."""
    firsts = [(targets == label).nonzero().flatten()[:MIRROR_EACH] for label in range(10)]
    return torch.stack(firsts, dim=1).flatten()


def sample_png(sample):
    """The specification's picture: decoded images (64, 784) as one 8 x 8 grid of 242 x 242 pixels, in PNG bytes."""
    buffer = io.BytesIO()
    save_image(sample.view(-1, 1, SIDE, SIDE), buffer, format="png", nrow=SAMPLE_COLUMNS)
    return buffer.getvalue()


def png(image):
    """A PIL image in PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def grid_image(images, **layout):
    """Images (N, 1, H, W) in [0, 1] in make_grid's layout, as one greyscale PIL image."""
    grid = make_grid(images, **layout)[0]  # make_grid gives three equal channels
    return Image.fromarray(grid.mul(255).round().to("cpu", torch.uint8).numpy())


@torch.no_grad()
def draw_canvas(model, device):
    """The plane itself, decoded at the `canvas_points`: 602 x 602 pixels, in PNG bytes."""
    images = model.decode(canvas_points().to(device))
    return png(grid_image(images.view(-1, 1, SIDE, SIDE), nrow=CANVAS_SIDE))


@torch.no_grad()
def draw_mirror(model, x):
    """Digits x (N, 784), each above its reconstruction from mu, in rows of ten pairs, in PNG bytes."""
    mu, _ = model.encode(x)
    pairs = torch.cat((x, model.decode(mu)), dim=1).view(-1, 1, 2 * SIDE, SIDE)
    return png(grid_image(pairs, nrow=10, padding=4, pad_value=0.35))


def strongholds(mu, targets):
    """Where each class is dense, pure and in the lead, (10, 2), for mu (N, 2) of digits of classes `targets` (N,)."""
    cells, cell_of = (2 * mu).round().unique(dim=0, return_inverse=True)  # squares of half a unit
    counts = torch.stack([torch.bincount(cell_of[targets == label], minlength=len(cells)) for label in range(10)])
    leads = counts == counts.amax(dim=0)  # so that two classes seldom claim the same cell
    best = (counts**2 / counts.sum(dim=0) * (leads + 1e-3)).argmax(dim=1)
    return torch.stack([mu[(cell_of == cell) & (targets == label)].mean(dim=0) for label, cell in enumerate(best)])


@torch.no_grad()
def draw_atlas(model, x, targets):
    """Digits x (N, 784) as points at their mu, coloured by class (N,): 900 x 900 pixels, in PNG bytes."""
    mu = model.encode(x)[0].cpu()
    chart = Chart(900, 900)
    limit = mu.abs().max().item()
    place = chart.axes((70, 96, 876, 850), ticks(-limit, limit), ticks(-limit, limit))
    chart.text((70, 28), f"Where the encoder puts {len(mu):,} digits it never saw", anchor="lm", size=20)
    chart.text((473, 890), "z1", anchor="mb")
    chart.text((10, 473), "z2", anchor="lm")
    for point, label in zip(mu.tolist(), targets.tolist()):
        chart.dot(place(*point), 1.7, CLASS_COLOURS[label])
    for label, stronghold in enumerate(strongholds(mu, targets).tolist()):
        for centre in (place(*stronghold), (82 + 40 * label, 68)):  # once on the map, once in the legend
            chart.dot(centre, 13, PAPER)
            chart.dot(centre, 11, CLASS_COLOURS[label])
            chart.text(centre, str(label), anchor="mm", colour=INK if label in LIGHT_CLASSES else PAPER)
    return chart.png()


def draw_history(history):
    """BCE, KLD and their sum by epoch, from a list of (training Loss, held-out Loss): 900 x 900, in PNG bytes."""
    chart = Chart(900, 900)
    panels = (
        ("Loss = BCE + KLD, nats an image", lambda loss: loss.total),
        ("BCE, the reconstruction error, nats an image", lambda loss: loss.bce),
        ("KLD, the cost of the code z, nats an image", lambda loss: loss.kld),
    )
    for row, (title, part) in enumerate(panels):
        curves = [[part(loss) for loss in losses] for losses in zip(*history)]
        values = [value for curve in curves for value in curve]
        top = 60 + 285 * row
        place = chart.axes((70, top, 876, top + 195), ticks(0, len(history), 1), ticks(min(values), max(values)))
        chart.text((70, top - 24), title, anchor="lm", size=18)
        for x, name, colour, curve in zip((520, 700), ("training", "held-out"), CURVE_COLOURS, curves):
            points = [place(epoch, value) for epoch, value in enumerate(curve, start=1)]
            chart.line(points, colour, 2)
            for point in [*points, (x, top - 24)]:
                chart.dot(point, 5, colour)
            chart.text((x + 14, top - 24), f"{name} {curve[-1]:.2f}", anchor="lm")
    chart.text((473, 890), "epoch", anchor="mb")
    return chart.png()


def ticks(low, high, least_step=0.0):
    """Round numbers that enclose [low, high], in about ten or fewer equal steps of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-6)
    power = 10.0 ** math.floor(math.log10(span / 10))
    step = max(least_step, next(factor * power for factor in (1, 2, 5, 10) if span <= 10 * factor * power))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * k for k in range(first, max(last, first + 1) + 1)]


class Chart:
    """A white sheet of width x height pixels to draw on, at twice its size, so that `png` can smooth the edges."""

    def __init__(self, width, height):
        self.size = (width, height)
        self.image = Image.new("RGB", (2 * width, 2 * height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points, colour, width):
        self.draw.line([(2 * x, 2 * y) for x, y in points], fill=colour, width=2 * width)

    def dot(self, centre, radius, colour):
        x, y = centre
        self.draw.ellipse([2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)], fill=colour)

    def text(self, position, text, anchor, colour=INK, size=16):
        x, y = position
        self.draw.text((2 * x, 2 * y), text, fill=colour, font=ImageFont.load_default(2 * size), anchor=anchor)

    def axes(self, box, x_ticks, y_ticks):
        """Draw a labelled grid into box (left, top, right, bottom); return the function from values to positions."""
        left, top, right, bottom = box

        def place(x, y):
            across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
            up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
            return left + across * (right - left), bottom - up * (bottom - top)

        for x in x_ticks:
            self.line([place(x, y_ticks[0]), place(x, y_ticks[-1])], RULE, 1)
            self.text((place(x, y_ticks[0])[0], bottom + 8), f"{x:g}", anchor="mt")
        for y in y_ticks:
            self.line([place(x_ticks[0], y), place(x_ticks[-1], y)], RULE, 1)
            self.text((left - 8, place(x_ticks[0], y)[1]), f"{y:g}", anchor="rm")
        return place

    def png(self):
        """The sheet at its own size, edges smoothed, in PNG bytes; 64 colours make it a fifth of the full file."""
        return png(self.image.resize(self.size, Image.Resampling.LANCZOS).quantize(64, Image.Quantize.FASTOCTREE))


# ---------------------------------------------------------------------------------------------------------------------
# Safety: files that are whole, failures that are said
# ---------------------------------------------------------------------------------------------------------------------

ROOM = 1 << 18  # bytes that must be free for a picture before training starts; every picture here is smaller


class DreamError(Exception):
    """A failure the user can meet: its text is all they see, and `exit_code` is what the process returns."""

    exit_code = 1


class UsageError(DreamError):
    """A command line that makes no sense."""

    exit_code = 2


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived; no Exception, so that no library's handler swallows it."""


@contextlib.contextmanager
def exclusive(folder):
    """Let one process at a time into the block; the kernel frees the lock of a process that is killed."""
    with open(os.path.join(folder, ".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # some network file systems know no locks: go on without
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for another run to be done with ./{folder}.", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def part_file(folder, data):
    """Write `data` to a file in `folder` for the block to move into place with os.replace, which is all or nothing.

    The name is fixed, and the file gone after the block: a killed process leaves one at most, and the next clears it.
    """
    part = os.path.join(folder, ".part")
    try:
        os.makedirs(folder, exist_ok=True)
        with exclusive(folder):
            try:
                with open(part, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield part
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(part)
    except OSError as error:
        raise DreamError(f"no picture can be saved in ./{folder}: {error}") from error


def check_room(folder, names):
    """Raise DreamError before any training if files of these names cannot be saved in `folder`."""
    with part_file(folder, bytes(ROOM)):
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


@contextlib.contextmanager
def signals_raise():
    """Within the block the first SIGINT or SIGTERM raises Stopped, so that everything is put away on the way out."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(signum, frame):
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not break what the first one puts away
        raise Stopped(signum)

    try:
        for number in handlers:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Tolerant:
    """A text stream whose reader may leave early (`| head -1`): what nobody reads is dropped and the work goes on.

    Any other fault (a full disk) is dropped too unless the stream is `essential`; then it raises DreamError.
    """

    def __init__(self, stream, essential):
        self.stream = stream or open(os.devnull, "w")  # None where the descriptor was closed from the start
        self.essential = essential

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            with open(os.devnull, "w") as nowhere:  # also for what is still in the buffer, flushed at exit
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if self.essential and not isinstance(error, BrokenPipeError):
                raise DreamError(f"standard output cannot be written: {error.strerror}") from error


def first_line(error):
    """What an exception says, without the advice that PyTorch appends on further lines."""
    return textwrap.shorten((str(error) or type(error).__name__).splitlines()[0], 400)


def explain(error):
    """The message for a failure outside the program's power, None for a bug, which shall keep its traceback."""
    reason = first_line(error)
    signs = ("CUDA error", "CUDA out of memory", "MPS backend out of memory", "can't allocate memory")
    if isinstance(error, DreamError):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or any(sign in reason for sign in signs):
        return f"the device failed: {reason}"
    if isinstance(error, MemoryError):
        return "there is not enough memory."
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that leaves it to `main` to report a wrong command line."""

    def error(self, message):
        raise UsageError(f"{message} (--help lists the options)")


def parse_arguments(argv):
    """Return the options as a namespace; raises UsageError, or SystemExit after --help."""

    def whole_number(least, most):
        def parse(text):
            try:
                number = int(text)
            except ValueError:
                number = least - 1
            if not least <= number <= most:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
            return number

        return parse

    def torch_device(text):
        with contextlib.suppress(RuntimeError):
            device = torch.device(text)
            if str(device) == text:  # torch takes cuda:256 for cuda:0
                return device
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: take cuda, cuda:1, cpu or mps")

    parser = OneLineParser(
        description="Train a variational autoencoder on MNIST and dream 64 new digits into dreams/dream_sample.png.",
        allow_abbrev=False,
    )
    epochs, seed = whole_number(1, 10**6), whole_number(0, 2**64 - 1)
    add = parser.add_argument
    add("--device", type=torch_device, default="cuda", help="where to train: cuda (default), cuda:1, cpu, mps, ...")
    add("--epochs", type=epochs, default=EPOCHS, metavar="N", help=f"passes over all digits (default {EPOCHS})")
    add("--seed", type=seed, default=SEED, metavar="N", help=f"the same number dreams the same dream (default {SEED})")
    add("--gallery", action="store_true", help="save four more pictures: canvas, mirror, atlas and history")
    add("--json", action="store_true", help="print the result as one line of JSON, all else on standard error")
    return parser.parse_args(argv)


def open_device(device):
    """Return the device's name for people; raises DreamError with PyTorch's own reason where it cannot be used."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        needed = "a CUDA GPU is required, but " if device.type == "cuda" else ""
        no_backend = isinstance(error, NotImplementedError)
        reason = "this PyTorch is built without it." if no_backend else first_line(error)
        raise DreamError(
            f"{needed}PyTorch cannot use the device '{device}': {reason}\n"
            "To train without a GPU: python quest_12_1.py --device cpu"
        ) from error
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)


def run(device, epochs, seed, gallery):
    """The whole job: train, dream, save. Returns the result as a dict; raises DreamError."""
    # Adam's moments of ever-black pixels decay into denormals, with which many CPUs crawl. PyTorch's threads take the
    # setting over when they start, so this comes before its first operation.
    torch.set_flush_denormal(True)
    device_name = open_device(device)
    names = ["dream_sample.png"]
    if gallery:
        names += ["dream_canvas.png", "dream_mirror.png", "dream_atlas.png", "dream_history.png"]
    check_room(DREAMS_DIR, names)

    train_dataset, test_dataset = load_mnist(DATA_DIR)
    x_train, x_test = pixels_of(train_dataset, device), pixels_of(test_dataset, device)
    print(f"The Dream Generator learns {len(x_train):,} digits on {device_name}: epochs {epochs}, seed {seed}.")

    torch.manual_seed(seed)
    train_loader = DataLoader(x_train, sampler=ShuffledBatches(x_train, BATCH_SIZE), batch_size=None)
    model = VAE().to(device)
    optimizer = optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    history, training_seconds = [], 0.0
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        train_loss = train_epoch(model, optimizer, train_loader, f"Epoch {epoch}/{epochs}")
        training_seconds += time.perf_counter() - start
        if gallery or epoch == epochs:
            held_out_loss = evaluate(model, x_test, seed)
            history.append((train_loss, held_out_loss))
    print(f"Held-out loss on {len(x_test):,} digits: {held_out_loss}.")

    pictures = [sample_png(dream(model, device))]
    if gallery:
        chosen = mirror_indices(test_dataset.targets).to(device)
        pictures += [
            draw_canvas(model, device),
            draw_mirror(model, x_test[chosen]),
            draw_atlas(model, x_test, test_dataset.targets),
            draw_history(history),
        ]
    for name, picture in zip(names, pictures):
        with part_file(DREAMS_DIR, picture) as part:
            os.replace(part, os.path.join(DREAMS_DIR, name))

    files = [f"{DREAMS_DIR}/{name}" for name in names]
    return {
        "success": True,
        "files": files,
        "message": f"The dream is ready: {', '.join(files)} (held-out loss {held_out_loss.total:.2f} nats an image, "
        f"trained in {training_seconds:.1f} s on {device_name}).",
        "device": str(device),
        "device_name": device_name,
        "epochs": epochs,
        "seed": seed,
        "training_seconds": training_seconds,
        "train_loss": {"total": train_loss.total, **train_loss._asdict()},
        "held_out_loss": {"total": held_out_loss.total, **held_out_loss._asdict()},
    }


def main(argv=None):
    """Run the command line `argv` (default: the process's own) and return the exit code; in the main thread.

    0: the pictures are saved. 1: a failure, 2: a wrong command line, 130 and 143: stopped by SIGINT or SIGTERM; each
    is said in one message on standard error. A bug raises.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in argv
    out, err = Tolerant(sys.stdout, essential=True), Tolerant(sys.stderr, essential=False)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err if as_json else out):
        try:
            with signals_raise():
                options = parse_arguments(argv)
                result = run(options.device, options.epochs, options.seed, options.gallery)
            print(json.dumps(result) if as_json else result["message"], file=out)
            return 0
        except Stopped as stopped:
            (signum,) = stopped.args
            message, exit_code = f"stopped by {signal.Signals(signum).name}.", 128 + signum
        except (DreamError, MemoryError, RuntimeError) as error:
            message, exit_code = explain(error), getattr(error, "exit_code", 1)
            if message is None:
                raise
        print(f"quest_12_1.py: {message}", file=err)
        if as_json:
            with contextlib.suppress(DreamError):  # what cannot be written was said on standard error
                print(json.dumps({"success": False, "message": message}), file=out)
        return exit_code


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # main listens to both; what comes after its last word is too late
    sys.exit(main())
