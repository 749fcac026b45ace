"""The Dream Generator: a variational autoencoder (VAE) that dreams handwritten digits.

    python quest_12_1.py                 train on a CUDA GPU, save dreams/dream_sample.png
    python quest_12_1.py --device cpu    the same without a GPU
    python quest_12_1.py --gallery       save four more pictures, the model, and a page to play with

The encoder maps each MNIST digit to a Gaussian over a plane, the decoder points of it to images.
Training maximises the evidence lower bound (ELBO) of the paper, Kingma & Welling, "Auto-Encoding
Variational Bayes", 2013, arXiv:1312.6114. Then standard normal points decode to new digits.

Ten epochs take 40 to 50 s on two cores of an AMD EPYC; no GPU has run this yet. They reach 154.3
nats per image (1 nat = 1.44 bits) on the 10,000 held-out digits: the mean of seeds 0 to 4.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset
from torchvision import datasets, transforms
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ---- Recipe --------------------------------------------------------------------------------------
SIDE = 28  # pixels, height and width of an image
PIXELS = SIDE * SIDE  # values in [0, 1] that make one image
HIDDEN = 400  # units per hidden layer: with 200 the loss is 2.4 nats higher, with 800 1.4 lower
LATENT_DIM = 2  # numbers in z, the code of an image: 2 make a plane, which can be drawn
BETA = 1  # weight of KLD in the loss: with 0 the noise fades, as in a plain autoencoder
EPOCHS = 10  # passes over the training set: after 20 the loss is 2.8 nats lower
BATCH_SIZE = 128  # images per step: 60,000 make 468 batches and a last one of 96
LEARNING_RATE = 1e-3  # of Adam
SEED = 0  # decides weights, batches, noise and dreams
SAMPLES = 64  # dreams in dream_sample.png
DATASET = datasets.MNIST  # or datasets.FashionMNIST, datasets.KMNIST: the same format
DATA_DIR, DREAMS_DIR = "data", "dreams"  # relative to the current directory


# ---- Data ----------------------------------------------------------------------------------------
def load_mnist(root):
    """Return the training set and the held-out set from the folder `root`. Raises OSError."""
    transform = transforms.ToTensor()
    try:
        train_dataset = DATASET(root, train=True, download=True, transform=transform)
        test_dataset = DATASET(root, train=False, download=True, transform=transform)
    except Exception as error:  # of many kinds: the disk's, the network's, the parser's
        folder = Path(root, DATASET.__name__).resolve()
        raise OSError(
            f"{DATASET.__name__} can be neither read from ./{root} nor downloaded: {error}\n"
            f"In a clone: git checkout -- {root}. Else go online, delete {folder} and run again."
        ) from error
    return train_dataset, test_dataset


def images_on(device, dataset):
    """Return all N images of `dataset`, transformed, as one tensor on `device`: (N, PIXELS).

    ToTensor turns bytes (height, width, channels) into (channels, height, width) in [0, 1]. With
    the N images as the channels of one picture it runs once and takes 6 s less than image by image.
    """
    if isinstance(dataset.transform, transforms.ToTensor):
        images = dataset.transform(dataset.data.permute(1, 2, 0).numpy())  # (N, SIDE, SIDE) again
    else:  # a transform that may not treat all images alike
        images = torch.stack([image for image, _ in dataset])
    return images.flatten(1).to(device)


class ShuffledBatches(IterableDataset):
    """Batches (batch_size, PIXELS) of the images x: (N, PIXELS), in a new random order each epoch.

    Each is one indexing operation where x is: 0.04 s per epoch, instead of 3 s image by image.
    """

    def __init__(self, x, batch_size):
        self.x, self.batch_size = x, batch_size

    def __len__(self):
        return len(self.x.split(self.batch_size))  # with the last one, which may be smaller

    def __iter__(self):
        order = torch.randperm(len(self.x)).to(self.x.device)
        for indices in order.split(self.batch_size):
            yield self.x[indices]


# ---- Model ---------------------------------------------------------------------------------------
class VAE(nn.Module):
    """Encoder and decoder, one hidden layer each: the paper's appendix C, but ReLU for its tanh."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, HIDDEN)  # some 180 of 400 units end up always 0 (see main)
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

    def reparameterize(self, mu, logvar, eps=None):
        """Draw z: (N, LATENT_DIM) from N(mu, exp(logvar)), in a way that has a gradient.

        A direct draw has no gradient. Here the randomness is in eps alone, new unless given, and so
        backpropagation reaches the encoder through mu and logvar (the paper's section 2.4).
        """
        std = torch.exp(logvar / 2)  # the square root of the variance
        eps = torch.randn_like(std) if eps is None else eps
        return mu + std * eps

    def decode(self, z):
        """Map z: (N, LATENT_DIM) to the mean of each pixel: (N, PIXELS) in [0, 1]."""
        h = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h))

    def forward(self, x, eps=None):
        """Map x: (N, PIXELS) or (N, 1, SIDE, SIDE) to recon_x: (N, PIXELS), mu and logvar."""
        mu, logvar = self.encode(x.flatten(1))
        z = self.reparameterize(mu, logvar, eps)
        return self.decode(z), mu, logvar


# ---- Loss, in nats -------------------------------------------------------------------------------
def loss_terms(recon_x, x, mu, logvar):
    """Return the loss and its parts, BCE and KLD, summed over the batch: three 0-dim tensors.

    BCE, the binary cross-entropy, is minus log p(x|z) for black and white pixels, recon_x being how
    probable white is. For grey ones it is a customary stand-in: a perfect copy costs 46 nats, 0.5
    everywhere PIXELS * ln 2 = 543. KLD, the Kullback-Leibler divergence of N(mu, exp(logvar)) from
    N(0, I), is 0 for mu = logvar = 0, where z says nothing about x (formula: the paper's appendix
    B). BCE pulls the codes of different images apart, KLD pulls them together.
    recon_x: (N, PIXELS) in [0, 1]; x: that or (N, 1, SIDE, SIDE); mu, logvar: (N, LATENT_DIM).
    """
    bce = F.binary_cross_entropy(recon_x, x.flatten(1), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())  # (mu^2 + var - 1 - log var) / 2
    return torch.add(bce, kld, alpha=BETA), bce, kld  # bce + BETA * kld, in one operation


def loss_function(recon_x, x, mu, logvar):
    """Return the summed loss: with BETA = 1, for black and white pixels, minus the ELBO."""
    return loss_terms(recon_x, x, mu, logvar)[0]


# ---- Training ------------------------------------------------------------------------------------
def train_epoch(model, optimizer, train_loader, bar):
    """Train on each batch once, moving `bar`; return the epoch's average loss in nats per image."""
    model.train()
    total_loss, trained_on = 0.0, 0  # in nats, in images
    for x in train_loader:
        optimizer.zero_grad()
        recon_x, mu, logvar = model(x)
        loss = loss_function(recon_x, x, mu, logvar)
        loss.backward()
        optimizer.step()
        total_loss += loss.detach().float()  # a float32 on the device: .item() would wait for it
        trained_on += len(x)
        bar.update()
    return total_loss.item() / trained_on  # here Python waits for the GPU


@torch.no_grad()
def evaluate(model, x_test, eps):
    """Return loss, BCE and KLD in nats per image; x_test: (N, PIXELS), eps: (N, LATENT_DIM)."""
    model.eval()
    recon_x, mu, logvar = model(x_test, eps)
    return (torch.stack(loss_terms(recon_x, x_test, mu, logvar)) / len(x_test)).tolist()


# ---- Dreaming ------------------------------------------------------------------------------------
CELLS, MIRRORED = 20, 4  # the plane has CELLS x CELLS cells; the mirror MIRRORED of each class
# RRGGBB of the classes 0 to 9, distinct on black for colour-blind eyes too:
COLOURS = "48a7ff aba844 f3d005 ff09b8 50ffae 0489a1 9d50ff fe8da8 b46657 b4c9f4".split()


@torch.no_grad()
def dream(model, z):
    """Decode z: (N, LATENT_DIM) into images: (N, 1, SIDE, SIDE) in [0, 1]."""
    model.eval()
    return model.decode(z).view(-1, 1, SIDE, SIDE)


def latent_grid():
    """Return the centres of cells that are equally likely under N(0, I): (CELLS * CELLS, 2)."""
    quantiles = torch.special.ndtri((torch.arange(CELLS) + 0.5) / CELLS)  # inverse normal CDF
    z2, z1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")  # z2 falls row by row
    return torch.stack((z1.flatten(), z2.flatten()), dim=1)


def latent_atlas(mu, x, targets):
    """Return an image for each cell of `latent_grid`: (CELLS * CELLS, 3, SIDE, SIDE) in [0, 1].

    It is the first of x: (N, PIXELS) whose mu: (N, 2) lies there, in its class's colour, or black.
    """
    place = CELLS * torch.special.ndtr(mu)  # the normal CDF: each cell is a unit square now
    column, row = place.long().clamp(max=CELLS - 1).unbind(dim=1)
    cell_of_image = (CELLS - 1 - row) * CELLS + column  # rows count upwards, pictures downwards
    atlas = torch.zeros(CELLS * CELLS, 3, SIDE, SIDE)
    for cell in cell_of_image.unique():
        first = (cell_of_image == cell).nonzero()[0, 0]
        colour = torch.tensor(list(bytes.fromhex(COLOURS[targets[first]]))) / 255
        atlas[cell] = colour.view(3, 1, 1) * x[first].view(1, SIDE, SIDE)
    return atlas


def reconstructions(model, x, targets):
    """Return images above their reconstructions from mu: (10 * MIRRORED, 1, 2 * SIDE, SIDE).

    They are the first MIRRORED of each class, the classes in turn. x: (N, PIXELS); targets: (N,).
    """
    first = [(targets == label).nonzero()[:MIRRORED] for label in targets.unique()]
    x = x[torch.cat(first, dim=1).flatten()]  # the first of each class, then the second of each
    mu, _ = model.encode(x)
    return torch.cat((x, model.decode(mu)), dim=1).view(-1, 1, 2 * SIDE, SIDE)


@torch.no_grad()
def save_gallery(folder, model, x_test, targets, growth):
    """Save four pictures and the model; growth: the dreams, (SAMPLES, 1, SIDE, SIDE), by epoch."""
    canvas = dream(model, latent_grid().to(x_test.device))
    save_image(canvas, f"{folder}/dream_canvas.png", nrow=CELLS)
    mu, _ = model.encode(x_test)
    atlas = latent_atlas(mu.cpu(), x_test.cpu(), targets)
    save_image(atlas, f"{folder}/dream_atlas.png", nrow=CELLS)
    pairs = reconstructions(model, x_test, targets)
    save_image(pairs, f"{folder}/dream_mirror.png", nrow=len(COLOURS), padding=4, pad_value=0.35)
    grids = [make_grid(dreams)[0] for dreams in growth]  # [0] is one of three equal channels
    first, *others = (transforms.functional.to_pil_image(grid) for grid in grids)
    options = {"save_all": True, "append_images": others, "loop": 0}
    first.save(f"{folder}/dream_growth.gif", duration=[500] * len(others) + [3000], **options)
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    buffer = io.BytesIO()  # torch.save itself would not say that a disk is full
    torch.save(weights, buffer)
    Path(folder, "dream_model.pt").write_bytes(buffer.getvalue())
    texts = {name: base64.b64encode(weight.numpy()).decode() for name, weight in weights.items()}
    script = f"const dreamModel = {json.dumps({'BETA': BETA, **texts})};\n"
    Path(folder, "dream_model.js").write_text(script)
    page = Path(__file__).with_name("dreams") / "plane.html"
    if page.exists():  # the script may be used without its repository
        Path(folder, page.name).write_bytes(page.read_bytes())


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
        raise OSError(
            f"PyTorch cannot use the device '{name}': {reason}\n"
            "By default, a CUDA GPU is required. Without one: python quest_12_1.py --device cpu"
        ) from error


@contextlib.contextmanager
def atomic_writes(folder):
    """Yield a temporary folder inside `folder`; after the block, move its files into `folder`."""
    os.makedirs(folder, exist_ok=True)
    with TemporaryDirectory(prefix=".part-", dir=folder, ignore_cleanup_errors=True) as part:
        yield part
        for name in os.listdir(part):
            os.replace(f"{part}/{name}", f"{folder}/{name}")  # atomic: the old or the whole new


# ---- The whole job: learn, then dream ------------------------------------------------------------
def learn_and_dream(options):
    """Do the whole job of the command line; return its result, a dict. Raises OSError."""
    device_name = open_device(options.device)
    train_dataset, test_dataset = load_mnist(DATA_DIR)
    x_train = images_on(options.device, train_dataset)
    x_test = images_on(options.device, test_dataset)
    with atomic_writes(options.output):
        pass  # a folder that cannot be written raises now, not after training

    torch.manual_seed(options.seed)
    model = VAE().to(options.device)
    optimizer = optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)  # one operation a step
    train_loader = DataLoader(ShuffledBatches(x_train, BATCH_SIZE), batch_size=None)  # x is batched
    # z and eps have their own generator, on the CPU: alike on every device, apart from training.
    generator = torch.Generator().manual_seed(options.seed)
    z = torch.randn(SAMPLES, LATENT_DIM, generator=generator).to(options.device)
    eps = torch.randn(len(x_test), LATENT_DIM, generator=generator).to(options.device)
    growth, train_losses, held_out_losses = [dream(model, z)], [], []
    seconds = 0.0  # of training
    for epoch in range(1, options.epochs + 1):
        with tqdm(total=len(train_loader), desc=f"Epoch {epoch}/{options.epochs}") as bar:
            train_losses.append(train_epoch(model, optimizer, train_loader, bar))
            seconds += bar.format_dict["elapsed"]  # without the evaluation
            loss, bce, kld = evaluate(model, x_test, eps)
            held_out_losses.append(loss)
            losses = f"loss {train_losses[-1]:.2f}, held-out {loss:.2f} nats per image"
            bar.set_description(f"{bar.desc}, {losses}")
        growth.append(dream(model, z))
    sample = growth[-1]
    with atomic_writes(options.output) as folder:
        save_image(sample, f"{folder}/dream_sample.png")
        if options.gallery:
            save_gallery(folder, model, x_test, test_dataset.targets, growth)
        files = [f"{options.output}/{name}" for name in sorted(os.listdir(folder))]
    message = f"Trained in {seconds:.1f} s on {device_name}. Held-out loss: {loss:.2f} nats per "
    message += f"image, BCE {bce:.2f} + {BETA} x KLD {kld:.2f}. The dream is ready: "
    return {
        "success": True, "files": files, "message": message + ", ".join(files), **vars(options),
        "device_name": device_name, "training_seconds": seconds, "train_losses": train_losses,
        "held_out_losses": held_out_losses, "held_out_loss": {"total": loss, "bce": bce, "kld": kld}
    }  # fmt: skip


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
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    if not 0 <= options.seed < 2**64:
        parser.error(f"--seed must be from 0 to {2**64 - 1}")
    if options.gallery and LATENT_DIM != 2:
        parser.error(f"--gallery draws a plane: it needs LATENT_DIM = 2, not {LATENT_DIM}")
    return options


def main(argv=None):
    """Run the command line `argv`, by default the process's own, and return the exit code.

    0: the files are saved. 1: an error. 130: Ctrl-C. Wrong options exit with 2; a bug is raised.
    It sets state of the process: the seed, the current GPU, and denormals flushed to zero.
    """
    options, result, exit_code = parse_arguments(argv), {"success": False}, 1
    # A unit of fc1 that is 0 for every digit has no gradient. Adam's averages of it decay to
    # denormals, numbers below 1e-38 with which many CPUs are slow: let them be 0.
    torch.set_flush_denormal(True)
    try:
        result, exit_code = learn_and_dream(options), 0
    except KeyboardInterrupt:
        result["message"], exit_code = "stopped by Ctrl-C.", 130
    except OSError as error:
        result["message"] = str(error)
    except RuntimeError as error:
        result["message"] = str(error).partition("\n")[0]
        if not result["message"].startswith("CUDA "):  # the GPU is full or lost, all else a bug
            raise
    if exit_code != 0:
        print(f"quest_12_1.py: {result['message']}", file=sys.stderr)
    if options.json or exit_code == 0:
        print(json.dumps(result) if options.json else result["message"])
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
