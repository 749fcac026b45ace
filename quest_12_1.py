"""The Dream Generator: a variational autoencoder (VAE) that dreams handwritten digits.

    python quest_12_1.py                 train on a CUDA GPU, save dreams/dream_sample.png
    python quest_12_1.py --device cpu    the same without a GPU
    python quest_12_1.py --gallery       save four more pictures: canvas, atlas, mirror, growth

The encoder maps each MNIST digit to a Gaussian over a plane: a centre and a spread. The decoder
maps points of the plane back to images. Training maximises the evidence lower bound (ELBO) of
Kingma & Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114. After it, points drawn
from a standard normal distribution decode to digits that nobody wrote.

Ten epochs take 24 to 28 s on two cores of an AMD EPYC (torch 2.14.1). They reach 154.3 nats per
image (1 nat = 1.44 bits) on the 10,000 held-out digits: the mean of seeds 0 to 4, with a standard
deviation of 0.6. This has not been run on a GPU yet.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import socket
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset
from torchvision import datasets, transforms
from torchvision.datasets import utils as dataset_utils
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ---- Recipe --------------------------------------------------------------------------------------
SIDE = 28  # pixels, height and width of an image
PIXELS = SIDE * SIDE  # values in [0, 1] that make one image
HIDDEN = 400  # units per hidden layer: with 200 the loss is 2.4 nats higher, with 800 1.4 lower
LATENT_DIM = 2  # numbers in z, the code of an image: 2 make a plane, which can be drawn
EPOCHS = 10  # passes over the training set: after 20 the loss is 2.8 nats lower
BATCH_SIZE = 128  # images per step: 60,000 make 468 batches and a last one of 96
LEARNING_RATE = 1e-3  # of Adam
SEED = 0  # decides weights, batches, noise and dreams
SAMPLES = 64  # dreams in dream_sample.png
DATASET = datasets.MNIST  # or datasets.FashionMNIST, datasets.KMNIST: the same format
DATA_DIR, DREAMS_DIR = "data", "dreams"  # relative to the current directory


# ---- Data ----------------------------------------------------------------------------------------
def load_mnist(root):
    """Return torchvision's training set and held-out test set, which are in the folder `root`."""
    transform = transforms.ToTensor()
    train_dataset = DATASET(root, train=True, download=True, transform=transform)
    test_dataset = DATASET(root, train=False, download=True, transform=transform)
    return train_dataset, test_dataset


def images_on(device, dataset):
    """Return all N images of `dataset` as one tensor on `device`: (N, PIXELS) in [0, 1].

    A transform takes one image: here, all of them stacked into one that is N * SIDE pixels high.
    """
    stacked = dataset.data.numpy().reshape(-1, SIDE)
    return dataset.transform(stacked).view(-1, PIXELS).to(device)


class ShuffledBatches(IterableDataset):
    """Batches (batch_size, PIXELS) of the images x: (N, PIXELS), in a new random order each epoch.

    A batch is one indexing operation on the device that holds x: 0.04 s per epoch on two CPU cores.
    A DataLoader of the dataset itself fetches image by image: 2.9 s, longer than the training.
    """

    def __init__(self, x, batch_size):
        self.x, self.batch_size = x, batch_size

    def __len__(self):
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.x)).to(self.x.device)
        for indices in order.split(self.batch_size):
            yield self.x[indices]


# ---- Model ---------------------------------------------------------------------------------------
class VAE(nn.Module):
    """Encoder and decoder, one hidden layer each: the paper's appendix C, but ReLU for its tanh."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, HIDDEN)
        self.fc21 = nn.Linear(HIDDEN, LATENT_DIM)  # mu
        self.fc22 = nn.Linear(HIDDEN, LATENT_DIM)  # logvar
        self.fc3 = nn.Linear(LATENT_DIM, HIDDEN)
        self.fc4 = nn.Linear(HIDDEN, PIXELS)

    def encode(self, x):
        """Map x: (N, PIXELS) to mu, logvar: (N, LATENT_DIM), the Gaussian of each image, q(z|x).

        logvar is the logarithm of the variance: any real number gives a positive variance.
        """
        h = F.relu(self.fc1(x))
        return self.fc21(h), self.fc22(h)

    def reparameterize(self, mu, logvar):
        """Draw z: (N, LATENT_DIM) from N(mu, exp(logvar)), in a way that has a gradient.

        A direct draw has no gradient. Here the randomness is in eps alone, so z is a function of
        mu and logvar, through which backpropagation reaches the encoder (section 2.4).
        """
        std = torch.exp(logvar / 2)  # the square root of the variance
        eps = torch.randn_like(std)
        return mu + std * eps

    def decode(self, z):
        """Map z: (N, LATENT_DIM) to the mean of each pixel: (N, PIXELS) in [0, 1]."""
        h = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h))

    def forward(self, x):
        """Map x: (N, PIXELS) or (N, 1, SIDE, SIDE) to recon_x: (N, PIXELS), mu and logvar."""
        mu, logvar = self.encode(x.view(-1, PIXELS))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


# ---- Loss: the negative ELBO, in nats -----------------------------------------------------------
def reconstruction_error(recon_x, x):
    """Return the binary cross-entropy (BCE), summed over pixels and images: a 0-dim tensor.

    For black and white x it is minus log p(x|z), where recon_x is how probable white pixels are.
    recon_x: (N, PIXELS) in [0, 1]; x: (N, PIXELS) or (N, 1, SIDE, SIDE) in [0, 1].
    """
    return F.binary_cross_entropy(recon_x, x.view(-1, PIXELS), reduction="sum")


def kl_divergence(mu, logvar):
    """Return the Kullback-Leibler divergence (KLD) of N(mu, exp(logvar)) from N(0, I), summed.

    mu, logvar: (N, LATENT_DIM); returns a 0-dim tensor. Appendix B derives the formula.
    """
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def loss_function(recon_x, x, mu, logvar):
    """Return the loss of a batch: 0-dim. On average over z, minus the loss is at most log p(x).

    BCE makes each z describe its image. KLD keeps the z of all images together where N(0, I) is
    dense, so that a point drawn from N(0, I) is likely to decode to a digit.
    """
    return reconstruction_error(recon_x, x) + kl_divergence(mu, logvar)


# ---- Training ------------------------------------------------------------------------------------
def train_epoch(model, optimizer, train_loader, desc):
    """Train on each batch once; return the average loss in nats per image. The bar is on stderr."""
    model.train()
    total_loss, images = 0.0, 0
    with tqdm(total=len(train_loader), desc=desc, unit="batch") as bar:  # open until the loss is in
        for x in train_loader:
            optimizer.zero_grad()
            recon_x, mu, logvar = model(x)
            loss = loss_function(recon_x, x, mu, logvar)
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()  # still on the device: .item() would wait for each step
            images += len(x)
            bar.update()
        average_loss = total_loss.item() / images  # the one place where Python waits for a GPU
        bar.set_postfix_str(f"loss {average_loss:.2f} nats per image")
    return average_loss


def train(model, x_train, epochs, after_epoch=lambda: None):
    """Train on x_train: (N, PIXELS); call `after_epoch` after each epoch. Returns their losses."""
    train_loader = DataLoader(ShuffledBatches(x_train, BATCH_SIZE), batch_size=None)  # as they are
    optimizer = optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)  # in one operation
    losses = []
    for epoch in range(1, epochs + 1):
        losses.append(train_epoch(model, optimizer, train_loader, f"Epoch {epoch}/{epochs}"))
        after_epoch()
    return losses


@torch.no_grad()
def evaluate(model, x_test):
    """Return the held-out loss on x_test: (N, PIXELS), in nats per image: total, BCE and KLD."""
    model.eval()
    recon_x, mu, logvar = model(x_test)
    bce = reconstruction_error(recon_x, x_test).item() / len(x_test)
    kld = kl_divergence(mu, logvar).item() / len(x_test)
    return {"total": bce + kld, "bce": bce, "kld": kld}


# ---- Dreaming ------------------------------------------------------------------------------------
GALLERY = ("dream_canvas.png", "dream_atlas.png", "dream_mirror.png", "dream_growth.gif")
CELLS = 20  # the canvas and the atlas divide the plane into CELLS x CELLS cells
MIRRORED = 4  # images of each class in the mirror
COLOURS = (  # red, green, blue of the classes 0 to 9, distinct on black for colour-blind eyes too
    (72, 167, 255), (171, 168, 71), (243, 208, 5), (255, 9, 184), (80, 255, 174),
    (4, 137, 161), (157, 80, 255), (254, 141, 168), (180, 102, 87), (180, 201, 244),
)  # fmt: skip


@torch.no_grad()
def dream(model, z):
    """Decode z: (N, LATENT_DIM) into images: (N, 1, SIDE, SIDE) in [0, 1]."""
    model.eval()
    return model.decode(z).view(-1, 1, SIDE, SIDE)


def latent_grid():
    """Return the centres of the cells: (CELLS * CELLS, 2), row by row from the upper left.

    All cells are equally likely under N(0, I). z1 grows to the right, z2 upwards.
    """
    quantiles = torch.special.ndtri((torch.arange(CELLS) + 0.5) / CELLS)  # the inverse normal CDF
    return torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)  # pairs of (z1, z2)


def latent_atlas(mu, x, targets):
    """Return one image per cell of `latent_grid`: (CELLS * CELLS, 3, SIDE, SIDE) in [0, 1].

    It is the first of x: (N, PIXELS) whose mu: (N, 2) lies in the cell, in the colour of its class
    in targets: (N,); black if there is none.
    """
    z1, z2 = (CELLS * torch.special.ndtr(mu)).long().clamp(max=CELLS - 1).unbind(dim=1)  # the CDF
    cell_of_image = (CELLS - 1 - z2) * CELLS + z1
    atlas = torch.zeros(CELLS * CELLS, 3, SIDE, SIDE)
    for cell in cell_of_image.unique():
        first = (cell_of_image == cell).nonzero()[0, 0]
        colour = torch.tensor(COLOURS[targets[first]]) / 255
        atlas[cell] = colour.view(3, 1, 1) * x[first].view(1, SIDE, SIDE)
    return atlas


@torch.no_grad()
def reconstructions(model, x, targets):
    """Return images above their reconstructions from mu: (10 * MIRRORED, 1, 2 * SIDE, SIDE).

    They are the first MIRRORED of each class, the classes in turn. x: (N, PIXELS); targets: (N,).
    """
    first = [(targets == label).nonzero()[:MIRRORED] for label in targets.unique()]
    x = x[torch.cat(first, dim=1).flatten()]  # one row per nth image, one column per class
    mu, _ = model.encode(x)
    return torch.cat((x, model.decode(mu)), dim=1).view(-1, 1, 2 * SIDE, SIDE)


@torch.no_grad()
def save_gallery(folder, model, x_test, targets, growth):
    """Save the pictures of GALLERY; growth is a list of images from `dream`, one for each frame."""
    canvas, atlas, mirror, animation = (f"{folder}/{name}" for name in GALLERY)
    save_image(dream(model, latent_grid().to(x_test.device)), canvas, nrow=CELLS)
    mu, _ = model.encode(x_test)
    save_image(latent_atlas(mu.cpu(), x_test.cpu(), targets), atlas, nrow=CELLS)
    pairs = reconstructions(model, x_test, targets)
    save_image(pairs, mirror, nrow=len(COLOURS), padding=4, pad_value=0.35)
    frames = [transforms.functional.to_pil_image(make_grid(sample)[0]) for sample in growth]
    durations = [500] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(animation, save_all=True, append_images=frames[1:], duration=durations, loop=0)


# ---- Devices and files ---------------------------------------------------------------------------
NETWORK_TIMEOUT = 5  # seconds of silence before a server is given up
UNPACKED_MD5 = {  # MD5 checksum of an archive of MNIST -> that of the file in it
    "f68b3c2dcbeaaa9fbdd348bbdeb94873": "6bbc9ace898e44ae57da46a324031adb",  # training images
    "d53e105ee54ea40749a09fcbcd1e9432": "a25bea736e30d166cdddb491f175f624",  # training labels
    "9fb629c4189551a2d022fa330f9573f3": "2646ac647ad5339dbf082846283269ea",  # test images
    "ec29112dd5afa0611ce80d1b7f02629c": "27ae3e4e09519cfbb04c329615203637",  # test labels
}


class DreamError(Exception):
    """An error outside the program. `main` prints its text, without a traceback."""


def open_device(name):
    """Try the device `name`, make it the current GPU, return its full name. Raises DreamError."""
    try:
        trial = torch.zeros(1, device=name)
        trial.item()  # waits for the device
        if trial.is_cuda:
            torch.cuda.set_device(trial.device)  # else Adam takes memory on the first GPU as well
            return torch.cuda.get_device_name()
    except Exception as error:  # CUDA's DeferredCudaCallError is no RuntimeError
        reason = str(error).partition("\n")[0][:300]
        raise DreamError(
            f"PyTorch cannot use the device '{name}': {reason}\n"
            "By default, a CUDA GPU is required. Without one: python quest_12_1.py --device cpu"
        ) from error
    return f"CPU ({torch.get_num_threads()}-thread)" if trial.is_cpu else name


@contextlib.contextmanager
def atomic_writes(folder):
    """Yield a temporary folder inside `folder`; after the block, move its files into `folder`.

    A move is atomic: whenever a run is killed, each file is the old one or the whole new one.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as temporary:
        yield temporary
        for name in os.listdir(temporary):
            os.replace(f"{temporary}/{name}", f"{folder}/{name}")


def check_room(files):
    """Raise OSError if these pictures could not be saved now."""
    for file in files:
        if os.path.isdir(file):
            raise IsADirectoryError(f"Is a directory: '{file}'")
    os.makedirs(DREAMS_DIR, exist_ok=True)
    with tempfile.TemporaryFile(dir=DREAMS_DIR) as trial:
        trial.write(bytes(2_000_000))  # the five pictures take less


def repair_mnist(root):
    """Unpack, or download, each file of the data set that is missing or damaged.

    torchvision asks only whether a file exists, and would train on half of one. Raises DreamError.
    """
    raw = f"{root}/{DATASET.__name__}/raw"
    try:
        for archive, md5 in DATASET.resources:
            path = f"{raw}/{archive}".removesuffix(".gz")
            if dataset_utils.check_integrity(path, UNPACKED_MD5.get(md5)):
                continue
            if os.path.exists(path):
                print(f"{path} has a wrong MD5 checksum: unpacking it again.", file=sys.stderr)
            with atomic_writes(raw) as temporary:
                if dataset_utils.check_integrity(f"{raw}/{archive}", md5):
                    dataset_utils.extract_archive(f"{raw}/{archive}", temporary)
                else:
                    url = DATASET.mirrors[0] + archive
                    dataset_utils.download_and_extract_archive(url, temporary, md5=md5)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise DreamError(
            f"{DATASET.__name__} can be neither read from ./{root} nor downloaded: {error}\n"
            f"Missing or damaged: {archive}\n"
            f"Put {', '.join(dict(DATASET.resources))} into\n{os.path.abspath(raw)} "
            f"(in a git clone: git checkout -- {root}) or connect to the network, and run again."
        ) from error


# ---- The whole job, and its command line ---------------------------------------------------------
def learn_and_dream(device, epochs, seed, gallery):
    """The whole job: return its result, a dict for JSON. Raises DreamError, OSError if no room."""
    # Some 160 of the 400 units of fc1 fall silent, and Adam's averages of their gradients decay to
    # denormals (below 1e-38), slow on many CPUs. Set first: threads take it over when they start.
    torch.set_flush_denormal(True)
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    device_name = open_device(device)
    files = [f"{DREAMS_DIR}/{name}" for name in ("dream_sample.png", *(GALLERY if gallery else ()))]
    check_room(files)
    repair_mnist(DATA_DIR)
    train_dataset, test_dataset = load_mnist(DATA_DIR)
    x_train, x_test = images_on(device, train_dataset), images_on(device, test_dataset)
    print(f"Training on {len(x_train):,} images, on {device_name}, seed {seed}.", file=sys.stderr)

    torch.manual_seed(seed)
    model = VAE().to(device)
    # A generator of its own, on the CPU: the seed alone decides z, on every device.
    z = torch.randn(SAMPLES, LATENT_DIM, generator=torch.Generator().manual_seed(seed)).to(device)
    growth = [dream(model, z)]
    start = time.perf_counter()
    train_losses = train(model, x_train, epochs, lambda: growth.append(dream(model, z)))
    training_seconds = time.perf_counter() - start
    held_out_loss = evaluate(model, x_test)

    sample = growth[-1]
    with atomic_writes(DREAMS_DIR) as temporary:
        save_image(sample, f"{temporary}/dream_sample.png")
        if gallery:
            save_gallery(temporary, model, x_test, test_dataset.targets, growth)

    trained = f"trained in {training_seconds:.1f} s on {device_name}"
    loss = "{total:.2f} nats per image: BCE {bce:.2f} + KLD {kld:.2f}".format(**held_out_loss)
    message = f"The dream is ready: {', '.join(files)} ({trained}, held-out loss {loss})."
    return {
        "success": True, "files": files, "message": message, "device": device,
        "device_name": device_name, "epochs": epochs, "seed": seed, "train_losses": train_losses,
        "training_seconds": training_seconds, "held_out_loss": held_out_loss,
    }  # fmt: skip


def parse_arguments(argv):
    """Return the options, a namespace. Exits with 2, usage and reason if they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, cpu, mps, ... (default: %(default)s)")
    add("--epochs", type=int, default=EPOCHS, help="passes over the data (default: %(default)s)")
    add("--seed", type=int, default=SEED, help="same seed, same picture (default: %(default)s)")
    add("--gallery", action="store_true", help=f"save four more pictures: {', '.join(GALLERY)}")
    add("--json", action="store_true", help="print the result as one line of JSON")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not 0 <= options.seed < 2**64:
        parser.error(f"--seed must be from 0 to {2**64 - 1}")
    if options.gallery and LATENT_DIM != 2:
        parser.error(f"--gallery draws a plane: it needs LATENT_DIM = 2, not {LATENT_DIM}")
    return options


def main(argv=None):
    """Run the command line `argv`, by default the process's own, and return the exit code.

    0: the pictures are saved. 1: an error. 130: Ctrl-C. Any other exception is a bug and is raised.
    """
    options = parse_arguments(argv)
    result, exit_code = {"success": False}, 1
    try:
        result = learn_and_dream(options.device, options.epochs, options.seed, options.gallery)
        exit_code = 0
    except KeyboardInterrupt:
        result["message"], exit_code = "stopped by Ctrl-C.", 130
    except DreamError as error:
        result["message"] = str(error)
    except OSError as error:
        result["message"] = f"no picture was saved in ./{DREAMS_DIR}: {error}"
    except RuntimeError as error:
        result["message"] = str(error).partition("\n")[0]
        if "CUDA" not in result["message"]:
            raise
    if not result["success"]:
        print(f"quest_12_1.py: {result['message']}", file=sys.stderr)
    if result["success"] or options.json:
        try:
            print(json.dumps(result) if options.json else result["message"], flush=True)
        except BrokenPipeError:  # the reader left (`| head -1`): what is unsent goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
