"""A variational autoencoder (VAE) that learns handwritten digits and dreams new ones.

    python quest_12_1.py                 train on a CUDA GPU
    python quest_12_1.py --device cpu    train without a GPU
    python quest_12_1.py --help          list the settings, each of which is an option

The decoder is a model of how an image arises. A point z of a plane is drawn from the
standard normal distribution, N(0, I). The decoder maps it to a probability of white for
each pixel. The product over the pixels is the probability of a whole image x, p(x|z).
The probability of x without z, p(x), is the average of p(x|z) over z drawn from
N(0, I), which is costly to compute. So the encoder proposes the z that matter for x: it
maps x to a Gaussian q(z|x), a small cloud in the plane. Training raises a lower bound
of log p(x) that needs only this cloud: the evidence lower bound (ELBO) of Kingma &
Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114.

A whole cloud has to decode to its image, so neighbours look alike. The bound also keeps
the clouds where most draws from N(0, I) fall, so these decode to new digits: the dreams.

The loss estimates the negative bound, in nats: units of the natural logarithm. After
ten epochs it is 153 to 156 for a held-out image, depending on the seed. With 0.5 for
every pixel it would be 543. Training takes 2 to 3 s on an NVIDIA H100, 45 s on one
thread of an AMD EPYC.

Reads data/MNIST. Writes dreams/dream_sample.png, a grid of 64 dreams, and
dreams/dream_model.pt, the model, which `python -m dreams.gallery` draws.
Needs torch, tried from 2.11 to 2.14, torchvision and tqdm.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms.functional import convert_image_dtype
from torchvision.utils import save_image
from tqdm import tqdm

# ---- Settings ------------------------------------------------------------------------
SIDE = 28  # height and width of an image, in pixels
PIXELS = SIDE * SIDE
DATASETS = ("MNIST", "FashionMNIST", "KMNIST")  # of torchvision, of this size
DATA_DIR = "data"  # relative to the current directory


def setting(default, help):
    """Return a field of Settings, with the text that --help shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What may differ from run to run. Raises ValueError for a value out of range.

    Each is an option of the command line: batch_size is --batch-size. What the help
    says of the loss was measured with three seeds, in nats per held-out image.
    """

    dataset: str = setting("MNIST", f"data set: {', '.join(DATASETS)}")
    hidden: int = setting(
        400,
        "units per hidden layer; with 200 the loss is 2 higher, with 800 about 1 lower",
    )
    latent_dim: int = setting(
        2, "numbers in z; 2 make a plane to look at, with 10 the loss is 44 lower"
    )
    beta: float = setting(1.0, "weight of KLD in the loss; with 1 the loss is -ELBO")
    epochs: int = setting(
        10, "passes over the training set; after 20 the loss is 3 lower"
    )
    batch_size: int = setting(128, "images per training step")
    learning_rate: float = setting(
        1e-3, "Adam's: about the most that a step moves a weight"
    )
    seed: int = setting(0, "decides the initial weights, batches, noise and dreams")
    samples: int = setting(64, "dreams in dream_sample.png")

    def __post_init__(self):
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset must be one of {', '.join(DATASETS)}")
        for name in ("hidden", "latent_dim", "epochs", "batch_size", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 0 <= self.beta < math.inf:
            raise ValueError("beta must be a number from 0 on")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError("learning_rate must be a number above 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError("seed must be from 0 to 2**64 - 1")


# ---- Data ----------------------------------------------------------------------------
def load_data(root, dataset=Settings.dataset):
    """Return the training set and the held-out set, of 60,000 and 10,000 images.

    Files that are missing in `root` are downloaded into it.
    """
    transform = transforms.ToTensor()
    dataset_class = getattr(datasets, dataset)
    options = {"download": True, "transform": transform}
    train_dataset = dataset_class(root, train=True, **options)
    test_dataset = dataset_class(root, train=False, **options)
    return train_dataset, test_dataset


def images_on(device, dataset):
    """Return all N images of `dataset`, in [0, 1]: (N, PIXELS) on `device`.

    Each image is transformed once, here, and not again in each epoch.
    """
    if isinstance(dataset.transform, transforms.ToTensor):
        # The same for all images at once, in 0.1 s in place of 5 s.
        images = convert_image_dtype(dataset.data)
    else:  # for a transform of your own
        images = torch.stack([image for image, label in dataset])
    return images.flatten(1).to(device)


# ---- Model ---------------------------------------------------------------------------
class VAE(nn.Module):
    """Encoder and decoder with one hidden layer each.

    These are the networks of the paper's appendix C, with ReLU in place of tanh.
    """

    def __init__(self, hidden=Settings.hidden, latent_dim=Settings.latent_dim):
        super().__init__()
        self.encoder_hidden = nn.Linear(PIXELS, hidden)
        self.encoder_mu = nn.Linear(hidden, latent_dim)
        self.encoder_logvar = nn.Linear(hidden, latent_dim)

        self.decoder_hidden = nn.Linear(latent_dim, hidden)
        self.decoder_pixels = nn.Linear(hidden, PIXELS)

    def encode(self, x):
        """Map images to the mean and the log-variance of their Gaussians q(z|x).

        x: (N, PIXELS) or (N, 1, SIDE, SIDE) in [0, 1]; mu, logvar: (N, latent_dim).

        A variance must be positive, while a network may output any number. So we read
        the output as the logarithm of the variance.
        """
        h = F.relu(self.encoder_hidden(x.flatten(1)))
        mu = self.encoder_mu(h)
        logvar = self.encoder_logvar(h)
        return mu, logvar

    def reparameterize(self, mu, logvar, eps=None):
        """Draw z: (N, latent_dim), from N(mu, exp(logvar)), so that it has a gradient.

        A direct draw, as by torch.normal, passes no gradient back to mu and logvar.
        Here the randomness is in eps alone, which is new unless given, so
        backpropagation reaches the encoder through mu and logvar (the paper's section
        2.4).
        """
        std = torch.exp(logvar / 2)  # the square root of the variance
        if eps is None:
            eps = torch.randn_like(std)
        return mu + std * eps

    def decode(self, z):
        """Map z: (N, latent_dim) to each pixel's probability of white: (N, PIXELS)."""
        h = F.relu(self.decoder_hidden(z))
        return torch.sigmoid(self.decoder_pixels(h))

    def forward(self, x, eps=None):
        """Encode x, draw one z for each image, decode it: return recon_x, mu, logvar.

        One z is enough. The gradient that it gives is noisy, but its average over eps
        is the gradient of the average loss. And training takes many small steps.
        """
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar, eps)
        return self.decode(z), mu, logvar


# ---- Loss, in nats (1 nat is 1.44 bits) ----------------------------------------------
# Two assumptions make sums of all that follows: given z, the pixels are independent;
# the numbers of z are independent, in q(z|x) as in p(z), which is N(0, I).
#
# KL(q || p) is the divergence of q from p, the mean of log q - log p over z from q. It
# is never negative.
#
# By Bayes' rule, log p(x) = log p(x|z) + log p(z) - log p(z|x) for every z. Take the
# mean over z from q(z|x), with log q(z|x) added and subtracted:
#
#     log p(x) = mean of log p(x|z) - KL(q(z|x) || p(z)) + KL(q(z|x) || p(z|x)).
#
# Without the last term the right side is a lower bound:
#
#     ELBO = mean of log p(x|z) - KL(q(z|x) || p(z)) = -(mean of BCE) - KLD.
#
# Raising it does at least one of two things: it makes x more probable to the decoder, or
# q(z|x) more like p(z|x).


def loss_terms(recon_x, x, mu, logvar, beta=Settings.beta):
    """Return the loss and its parts, BCE and KLD, summed over the batch.

    recon_x: (N, PIXELS) in [0, 1]; x: the same, or (N, 1, SIDE, SIDE); mu and logvar:
    (N, latent_dim). Returns three 0-dim tensors.

    BCE, the binary cross-entropy, is the sum over the pixels of

        -x log(recon_x) - (1 - x) log(1 - recon_x).

    If each pixel is black or white, this is -log p(x|z), recon_x being the probability
    of white. For grey pixels it is the average over random drawings in which a grey of
    0.3 is white 3 times in 10. Such a pixel costs its entropy, 0.61, even if recon_x is
    0.3 as well. So a perfect copy costs 46 nats, on average over MNIST's held-out
    images.

    KLD, the Kullback-Leibler divergence of q(z|x) from N(0, I), is the sum over the
    numbers in z of

        -(1 + log(variance) - mu^2 - variance) / 2.

    It is 0 if mu = logvar = 0, and grows as mu leaves 0 or the variance leaves 1. If it
    were 0 for every x, z would say nothing about x.

    BCE pulls the clouds of different images apart: where they overlap, z does not tell
    which image to draw. KLD pulls them together.
    """
    # Over the pixels, too, it has to be a sum: -log p(x|z) is one. With their mean, KLD
    # would weigh PIXELS times as much, while Adam's step would be about as large.
    bce = F.binary_cross_entropy(recon_x, x.flatten(1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())  # appendix B
    return bce + beta * kld, bce, kld


def loss_function(recon_x, x, mu, logvar, beta=Settings.beta):
    """Return the loss alone, summed over the batch.

    With beta = 1 it estimates -ELBO, which is never below -log p(x). The estimate, from
    one random z per image, may fall below, but not on average.
    """
    return loss_terms(recon_x, x, mu, logvar, beta)[0]


# ---- Learning ------------------------------------------------------------------------
def train_step(model, optimizer, x, beta=Settings.beta):
    """Take one step on the batch x: (B, PIXELS); return its summed loss, 0-dim."""
    optimizer.zero_grad()
    recon_x, mu, logvar = model(x)
    loss = loss_function(recon_x, x, mu, logvar, beta)
    # Over the batch, Adam's step is as large for a sum as for a mean; SGD's is not.
    loss.backward()
    optimizer.step()
    return loss.detach()  # the number, without the record of how it was computed


def train_epoch(step, train_loader):
    """Call step(x) on each batch x: (B, PIXELS); return the average loss per image.

    `step` returns the summed loss of its batch, as `train_step` does.
    """
    total_loss = 0.0
    image_count = 0
    for x in train_loader:
        total_loss += step(x)  # still a tensor: .item() would wait for the GPU
        image_count += len(x)
    return total_loss.item() / image_count


@torch.no_grad()
def evaluate(model, x_test, eps, beta=Settings.beta):
    """Return loss, BCE and KLD in nats per image, three numbers.

    x_test: (N, PIXELS); eps: (N, latent_dim), the noise from which z is made. All
    images are decoded at once, which takes 79 MB for 10,000 of them and 400 hidden
    units.
    """
    recon_x, mu, logvar = model(x_test, eps)
    terms = torch.stack(loss_terms(recon_x, x_test, mu, logvar, beta))
    return (terms / len(x_test)).tolist()


@torch.no_grad()
def dream(model, z):
    """Decode z: (N, latent_dim) into images: (N, 1, SIDE, SIDE) in [0, 1].

    They show the pixels' probabilities of white, and draw no black or white from them.
    """
    return model.decode(z).view(-1, 1, SIDE, SIDE)


@torch.no_grad()
def nan_to_zero(layer, inputs, output):
    """A safety net, no part of the method: it changes nothing in a run that goes well.

    If the learning rate is too high, weights grow until an output of the decoder's last
    layer is NaN. F.binary_cross_entropy refuses that, and would stop a GPU without a
    message of ours. With 0 in its place the run goes on to the end of the epoch. There
    `check_finite` ends it with one message: a weight that is NaN stays so; if only a
    sum has overflowed, so had KLD in all trials: the training loss is not finite.
    """
    output.nan_to_num_()


def check_finite(model, train_loss, held_out, learning_rate):
    """Raise FloatingPointError if a loss or a weight of the model is not finite."""
    weight_sum = parameters_to_vector(model.parameters()).sum().item()
    if not math.isfinite(train_loss + held_out + weight_sum):
        raise FloatingPointError(
            f"loss {train_loss}, held-out loss {held_out}, "
            f"sum of weights {weight_sum}: lower the learning rate, {learning_rate}"
        )


def learn(x_train, x_test, settings=Settings(), accelerate=lambda step: step):
    """Train a VAE on x_train: (N, PIXELS); measure it on x_test: (M, PIXELS).

    Both are on the device on which to train. In each epoch `accelerate` is given the
    training step, step(x), and returns what is called in its place: by default the step
    itself, on a GPU one that does the same faster (`CapturedStep`, below).

    Returns the model; a list of dreams, (samples, 1, SIDE, SIDE) each, before training
    and after each epoch; and a list of each epoch's losses, in nats per image. The
    training loss is an average over the epoch, during which the weights improve. Sets
    PyTorch's seed, writes progress to standard error. Raises FloatingPointError if a
    loss or a weight is not finite.
    """
    torch.manual_seed(settings.seed)
    device = x_train.device
    model = VAE(settings.hidden, settings.latent_dim).to(device)
    model.decoder_pixels.register_forward_hook(nan_to_zero)
    optimizer = optim.Adam(
        model.parameters(),
        lr=settings.learning_rate,
        fused=True,  # do each tensor's whole update in one pass
        capturable=True,  # let CapturedStep, below, record its update
    )
    # A tensor serves as a data set: x_train[i] is an image.
    train_loader = DataLoader(x_train, batch_size=settings.batch_size, shuffle=True)

    # The dreams' z and the evaluation's eps are drawn once, apart from training's noise
    # and on the CPU: they are the same after each epoch, and on every device.
    generator = torch.Generator().manual_seed(settings.seed)
    z = torch.randn(settings.samples, settings.latent_dim, generator=generator)
    z = z.to(device)
    eps = torch.randn(len(x_test), settings.latent_dim, generator=generator)
    eps = eps.to(device)

    def step(x):
        return train_step(model, optimizer, x, settings.beta)

    model.eval()
    dreams = [dream(model, z)]
    losses = []
    for epoch in range(1, settings.epochs + 1):
        tag = f"Epoch {epoch}/{settings.epochs}"
        model.train()  # as dropout would need it, which this model has not
        fast_step = accelerate(step)
        progress_bar = tqdm(train_loader, tag, leave=False)
        train_loss = train_epoch(fast_step, progress_bar)

        model.eval()
        held_out, bce, kld = evaluate(model, x_test, eps, settings.beta)
        check_finite(model, train_loss, held_out, settings.learning_rate)
        tqdm.write(
            f"{tag}: loss {train_loss:.2f}, "
            f"held-out loss {held_out:.2f} nats per image",
            file=sys.stderr,
        )
        losses.append(
            {"train": train_loss, "held_out": held_out, "bce": bce, "kld": kld}
        )
        dreams.append(dream(model, z))
    return model, dreams, losses


# ======================================================================================
# The method ends here: a reader may stop. What follows runs it: fast on a GPU, from the
# command line, with files that are whole and errors that say what to do.


# ---- A faster step on CUDA -----------------------------------------------------------
class CapturedStep:
    """Do what step(x) does on a CUDA GPU, faster: record a CUDA graph and replay it.

    A CUDA graph is a recording of operations, which the CPU starts with one call. A
    training step has some 76 short ones. An H100 computes them in 0.3 ms, but to start
    them one by one takes the host's CPU 1.9 ms. A replay does them to the batch that it
    is given, draws new noise as step(x) would, and leaves the same bits.

    The first batch and a smaller last one are not replayed: step(x) is called. In a
    replay no Python runs, so a number that Python changes while an epoch runs, as a
    learning rate may be, keeps the value that it had when the step was recorded, unless
    it is a tensor on the GPU. Changed between epochs it is followed, since each epoch
    makes a CapturedStep of its own.
    """

    def __init__(self, step):
        self.step = step
        self.x = None  # the memory from which the recorded step reads its batch
        self.graph = None
        self.loss = None  # the memory into which it writes its loss

    def __call__(self, x):
        if self.x is None:
            # With a run's first batch libraries and Adam set themselves up, which must
            # not be recorded. Each epoch begins so.
            self.x = x.clone()
            return self.step(x)
        if x.shape != self.x.shape:
            # A smaller last batch does not fit the recorded memory.
            return self.step(x)
        if self.graph is None:
            self.record()
        self.x.copy_(x)
        self.graph.replay()
        return self.loss.clone()  # a copy, since the next replay overwrites the loss

    def record(self):
        """Record the step without doing it."""
        self.graph = torch.cuda.CUDAGraph()
        stream = capture_stream(self.x.device)
        try:
            with torch.cuda.graph(self.graph, stream=stream):
                self.loss = self.step(self.x)
        except torch.AcceleratorError as error:
            # The step's own error, with its line, is in the traceback above this one.
            raise RuntimeError(
                "this step cannot be recorded: it may wait for the GPU, as .item() does"
            ) from error


@functools.cache
def capture_stream(device):
    """Return the stream, a queue of work, on which this GPU's steps are recorded.

    It is one for each GPU, since PyTorch keeps memory for each stream in use.
    """
    return torch.cuda.Stream(device)


# ---- The job: device, data, files ----------------------------------------------------
class JobError(Exception):
    """An expected failure, whose message says all that a user needs."""


def first_line(error):
    """Return what an error says first; PyTorch's go on for a page."""
    return str(error).partition("\n")[0][:500]


def open_device(name):
    """Return the device after one operation on it, or raise JobError."""
    try:
        trial = torch.zeros(1, device=name)
        trial.item()  # waits until the device has done it
        if trial.is_cuda:
            torch.cuda.set_device(trial.device)  # else some calls would open GPU 0 too
        return trial.device
    except Exception as error:  # PyTorch raises many kinds
        raise JobError(
            f"PyTorch cannot use the device '{name}': {first_line(error)}. "
            "By default a CUDA GPU is required; without one, add --device cpu."
        ) from error


def open_data(dataset):
    """Return what `load_data` returns, or raise JobError with folder and cure."""
    try:
        return load_data(DATA_DIR, dataset)
    except Exception as error:  # torchvision raises many kinds for a damaged file
        raise JobError(
            f"{Path(DATA_DIR, dataset).resolve()} can be neither read nor downloaded. "
            "Run in the folder of the clone, or online. "
            f"If MNIST is damaged: git checkout -- {DATA_DIR}/MNIST. {error!r}"
        ) from error


def save_files(folder, contents):
    """Write `contents`, {name: bytes}, into `folder`; return the files' paths.

    A file is replaced whole or not at all: all are written into a temporary folder
    first, then moved. Raises JobError if they cannot be saved. With no contents it only
    tries the folder.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with TemporaryDirectory(
            prefix=".part-", dir=folder, ignore_cleanup_errors=True
        ) as temporary:
            for name, data in contents.items():
                Path(temporary, name).write_bytes(data)
            for name in contents:
                os.replace(Path(temporary, name), Path(folder, name))
    except OSError as error:
        raise JobError(f"cannot save in '{folder}': {error}") from error
    return [str(Path(folder, name)) for name in contents]


def png_bytes(images):
    """Return a grid of images: (N, 1, H, W) in [0, 1], as the bytes of a PNG file."""
    buffer = io.BytesIO()
    save_image(images, buffer, format="png")
    return buffer.getvalue()


def model_bytes(settings, model, dreams, losses):
    """Return the bytes of a file that torch.load opens: all that a run has made."""
    saved = {
        "settings": dataclasses.asdict(settings),
        "model": {name: weight.cpu() for name, weight in model.state_dict().items()},
        "losses": losses,
        "dreams": [images.cpu() for images in dreams],
    }
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


def run_job(settings, device_name, folder):
    """Train, dream and save; return the result, a dict."""
    device = open_device(device_name)
    train_dataset, test_dataset = open_data(settings.dataset)
    x_train = images_on(device, train_dataset)
    x_test = images_on(device, test_dataset)
    save_files(folder, {})  # a folder that cannot be written is told before training

    start = time.perf_counter()
    if device.type == "cuda":
        model, dreams, losses = learn(x_train, x_test, settings, CapturedStep)
    else:
        model, dreams, losses = learn(x_train, x_test, settings)
    seconds = time.perf_counter() - start

    sample = dreams[-1]
    files = save_files(
        folder,
        {
            "dream_sample.png": png_bytes(sample),
            "dream_model.pt": model_bytes(settings, model, dreams, losses),
        },
    )
    last = losses[-1]
    message = (
        f"Trained in {seconds:.1f} s on {device_name}. "
        f"Held-out loss: {last['held_out']:.2f} nats per image, "
        f"BCE {last['bce']:.2f} + {settings.beta:g} x KLD {last['kld']:.2f}. "
        f"The dream is ready: {', '.join(files)}"
    )
    return {
        "success": True,
        "files": files,
        "message": message,
        "device": device_name,
        "settings": dataclasses.asdict(settings),
        "training_seconds": seconds,
        "losses": losses,
    }


# ---- The command line ----------------------------------------------------------------
def parse(argv):
    """Return the command line's Settings, and its other options."""
    parser = argparse.ArgumentParser(
        description="Train a variational autoencoder and let it dream digits.",
        allow_abbrev=False,
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--device", default="cuda", help=f"cuda, cuda:1, cpu or mps {default}"
    )
    parser.add_argument(
        "--output", default="dreams", help=f"folder for what is saved {default}"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=field.type,
            default=field.default,
            help=f"{field.metadata['help']} {default}",
        )
    args = parser.parse_args(argv)
    values = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)
    }
    try:
        return Settings(**values), args
    except ValueError as error:
        parser.error(str(error))


def is_gpu_failure(error):
    """Tell a GPU that is full or lost from a bug, which keeps its traceback."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return True
    # A failed call of a CUDA library and Apple's full GPU have no class of their own.
    return str(error).startswith(("CUDA error", "MPS backend out of memory"))


def main(argv=None):
    """Run the command line `argv`, by default the process's own; return its code."""
    settings, args = parse(argv)
    # Units that are no longer active leave ever smaller numbers, denormals, in Adam's
    # averages. Many CPUs are slow with them. Set to 0, they cost nothing.
    torch.set_flush_denormal(True)
    try:
        result = run_job(settings, args.device, args.output)
    except (JobError, FloatingPointError) as error:
        result = {"success": False, "message": str(error)}
    except RuntimeError as error:
        if not is_gpu_failure(error):
            raise
        result = {"success": False, "message": first_line(error)}

    if args.json:
        print(json.dumps(result))
    elif result["success"]:
        print(result["message"])
    if result["success"]:
        return 0
    print(f"quest_12_1.py: {result['message']}", file=sys.stderr)
    return 1


def run_as_process(main, name):
    """Exit with the code of main(). After Ctrl-C, say so and die of its signal.

    Only then does a shell's loop around this process end as well.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C.", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    run_as_process(main, "quest_12_1.py")
