"""Draw what a saved model has learned.

    python -m dreams.gallery                     draw dreams/dream_model.pt
    python -m dreams.gallery runs/7              draw runs/7/dream_model.pt
    python -m dreams.gallery --beside runs/7     show runs/7's model on the page as well

Run it in the folder of the clone, after a run of quest_12_1.py. It reads the model, its
data set in data, and dreams/plane.html. It writes, beside the model:

    dream_growth.gif    the dreams before training and after each epoch
    dream_mirror.png    held-out images, each above what its code decodes to
    dream_canvas.png    what points of the plane decode to
    dream_codes.png     where the encoder puts the held-out images on that plane
    dream_plane.html    a page on which to draw and to move a cloud over that plane

The last three need a model with two numbers in z, the page a network that it can
compute.
"""

import argparse
import base64
import io
import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import quest_12_1 as quest

MODEL = "dream_model.pt"
PICTURES = (
    "dream_growth.gif",
    "dream_mirror.png",
    "dream_canvas.png",
    "dream_codes.png",
    "dream_plane.html",
)
TEMPLATE = Path(__file__).with_name("plane.html")
SLOT = '<script id="run" type="application/json"></script>'  # to be filled, in TEMPLATE

CELLS = 20  # points of the plane in each direction that the canvas shows
PLANE = 600  # width and height of the plane in a picture, in pixels
STRIP = 28  # height of the text above a picture, in pixels
GROWN = 2  # dreams of which the page shows how they grew
EACH = 100  # held-out images of each class that the page holds; the mirror shows 4
LEAST_EXTENT = 4  # from -4 to 4 the plane holds all but 1 in 8,000 of the dreams
HELD = 0.99  # share of the codes that the plane holds at least

# Colours of the ten classes, distinct on black for colour-blind eyes too.
COLOURS = (
    "#48a7ff",
    "#fe8da8",
    "#f3d005",
    "#b4c9f4",
    "#50ffae",
    "#0489a1",
    "#9d50ff",
    "#aba844",
    "#b46657",
    "#ff09b8",
)


# ---- What was saved ------------------------------------------------------------------
class Run:
    """A saved run: settings, model, losses, dreams, and the held-out images' codes.

    x, targets: the held-out images, (N, PIXELS), and their classes, (N,).
    mu, logvar: their codes, (N, latent_dim).
    """

    def __init__(self, folder):
        path = Path(folder, MODEL)
        saved = read_model(path)
        self.settings = saved["settings"]
        self.losses = saved["losses"]
        self.dreams = saved["dreams"]
        self.model = quest.VAE(self.settings.hidden, self.settings.latent_dim)
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise quest.JobError(
                f"{path} holds another network than the VAE of quest_12_1.py."
            ) from error
        self.model.eval().requires_grad_(False)

        self.dataset = quest.open_data(self.settings.dataset)[1]
        self.x = quest.images_on("cpu", self.dataset)
        self.targets = self.dataset.targets
        if self.x.shape[1] != quest.PIXELS:
            raise quest.JobError(
                f"the images of {self.settings.dataset} have {self.x.shape[1]} pixels, "
                f"not {quest.PIXELS}."
            )
        self.mu, self.logvar = self.model.encode(self.x)

    @property
    def title(self):
        """Which run this is, in a few words."""
        settings = self.settings
        return (
            f"{settings.dataset}, beta {settings.beta:g}, "
            f"{settings.epochs} epochs, seed {settings.seed}"
        )

    @property
    def extent(self):
        """Half the width of the plane that holds the codes: a whole number."""
        farthest = self.mu.abs().amax(dim=1).quantile(HELD).item()
        return max(LEAST_EXTENT, math.ceil(farthest))


def read_model(path):
    """Return what quest_12_1.py has saved at `path`, its settings as Settings."""
    if not path.is_file():
        raise quest.JobError(f"there is no {path}: run python quest_12_1.py first.")
    try:
        saved = torch.load(path)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise quest.JobError(
            f"{path} cannot be read, {type(error).__name__}: {quest.first_line(error)}"
        ) from error
    try:
        return {
            "settings": quest.Settings(**saved["settings"]),
            "model": saved["model"],
            "losses": saved["losses"],
            "dreams": saved["dreams"],
        }
    except (LookupError, TypeError, ValueError) as error:
        raise quest.JobError(
            f"{path} is not of this version: run python quest_12_1.py again."
        ) from error


def images_of_each_class(run, count):
    """Return held-out images with the classes in turn: (10 * count, PIXELS).

    Image k is of class k % 10. Returns their places in run.x as well, and raises
    JobError where a class has fewer than `count`.
    """
    places = []
    for k, name in enumerate(class_names(run)):
        of_class = (run.targets == k).nonzero().flatten()
        if len(of_class) < count:
            raise quest.JobError(
                f"{run.settings.dataset} has {len(of_class)} held-out images of class "
                f"{name}; the gallery shows {count}."
            )
        places.append(of_class[:count])
    places = torch.stack(places, dim=1).flatten()
    return run.x[places], places


def class_names(run):
    """Return the names of the ten classes: torchvision has "0 - zero" for MNIST's 0."""
    return [name.partition(" - ")[0] for name in run.dataset.classes]


# ---- Pictures: each function draws one, and knows no file ----------------------------
def square(images):
    """View images: (N, PIXELS) as (N, 1, SIDE, SIDE)."""
    return images.view(-1, 1, quest.SIDE, quest.SIDE)


def with_title(picture, title):
    """Return the picture with a line of text above it."""
    framed = Image.new(picture.mode, (picture.width, picture.height + STRIP))
    framed.paste(picture, (0, STRIP))
    ImageDraw.Draw(framed).text((4, 3), title, fill="white", font_size=18)
    return framed


def enlarged(picture, times):
    """Return the picture with each pixel `times` as wide and as high."""
    return picture.resize(
        (picture.width * times, picture.height * times), Image.NEAREST
    )


def draw_growth(run):
    """Return the frames: the dreams before training and after each epoch."""
    frames = []
    for epoch, images in enumerate(run.dreams):
        picture = enlarged(to_pil_image(make_grid(images)[0]), times=2)
        when = f"after epoch {epoch}" if epoch else "before training"
        frames.append(with_title(picture, f"{run.settings.dataset}: {when}"))
    return frames


def draw_mirror(run):
    """Return four held-out images of each class, each above what its mu decodes to."""
    x, places = images_of_each_class(run, 4)
    recon_x = run.model.decode(run.mu[places])
    pairs = torch.cat((x, recon_x), dim=1).view(-1, 1, 2 * quest.SIDE, quest.SIDE)
    picture = to_pil_image(make_grid(pairs, nrow=10, padding=4, pad_value=0.35))
    return with_title(enlarged(picture, times=2), run.title)


def draw_canvas(run):
    """Return what CELLS x CELLS points of the plane decode to, z2 growing upwards."""
    edges = torch.linspace(-run.extent, run.extent, CELLS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    z1, z2 = torch.meshgrid(centres, -centres, indexing="xy")
    z = torch.stack((z1.flatten(), z2.flatten()), dim=1)
    grid = make_grid(quest.dream(run.model, z), nrow=CELLS)
    return with_title(to_pil_image(grid), f"{run.title}: {span(run.extent)}")


def draw_codes(run):
    """Return the plane with a dot at each held-out image's mu, coloured by class."""
    picture = draw_plane(run.mu, run.targets, run.extent)
    x, _ = images_of_each_class(run, 1)
    legend = torch.cat(
        [
            torch.tensor(rgb(colour)).view(3, 1, 1) / 255 * image
            for colour, image in zip(COLOURS, square(x), strict=True)
        ],
        dim=2,
    )
    picture.paste(to_pil_image(legend))
    return with_title(picture, f"{run.title}: {span(run.extent)}")


def draw_plane(mu, targets, extent, size=PLANE):
    """Draw a dot at each mu: (N, 2), coloured by class, and N(0, I)'s circles.

    The circles have the radii 1, 2 and 3. The dots are drawn in the order of the
    images, in which the classes are mixed, so that no class hides another.
    """
    fine = 4 * size  # drawn large, then reduced: smooth edges
    picture = Image.new("RGB", (fine, fine))
    draw = ImageDraw.Draw(picture)
    scale = fine / (2 * extent)
    for (z1, z2), target in zip(mu.tolist(), targets.tolist(), strict=True):
        place = (fine / 2 + scale * z1, fine / 2 - scale * z2)
        draw.circle(place, 5, fill=COLOURS[target])
    for radius in (1, 2, 3):
        draw.circle((fine / 2, fine / 2), radius * scale, outline="white", width=5)
    return picture.reduce(4)


def span(extent):
    return f"the plane from -{extent} to {extent}"


def rgb(colour):
    """Return the three numbers from 0 to 255 of a colour like "#48a7ff"."""
    return list(bytes.fromhex(colour[1:]))


# ---- The page ------------------------------------------------------------------------
def why_no_page(run):
    """Return why the page cannot compute the model, or None if it can.

    The page computes a hidden layer of ReLU in encoder and decoder, by these names.
    """
    hidden, latent_dim = run.settings.hidden, run.settings.latent_dim
    if latent_dim != 2:
        return f"a page and a plane need two numbers in z, this model has {latent_dim}"
    known = {
        "encoder_hidden": (hidden, quest.PIXELS),
        "encoder_mu": (2, hidden),
        "encoder_logvar": (2, hidden),
        "decoder_hidden": (hidden, 2),
        "decoder_pixels": (quest.PIXELS, hidden),
    }
    shapes = {}
    for name, (outputs, inputs) in known.items():
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)
    state = run.model.state_dict()
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
        return "the page computes another network than this model's"
    return None


def encoded(tensor):
    """Return the bytes of a tensor, row by row, as base64 text."""
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def page_model(run, x, places):
    """Return what the page needs of one model.

    `codes` are mu and logvar of the images x. With `example`, what PyTorch makes of the
    first of them, the page checks that it computes the same.
    """
    mu, logvar = run.mu[places], run.logvar[places]
    decoded = run.model.decode(mu[:1])
    terms = quest.loss_terms(decoded, x[:1], mu[:1], logvar[:1], run.settings.beta)
    return {
        "settings": vars(run.settings),
        "losses": run.losses[-1],
        "extent": run.extent,
        "tensors": {
            name: encoded(tensor) for name, tensor in run.model.state_dict().items()
        },
        "codes": encoded(torch.cat((mu, logvar), dim=1)),
        "example": {
            "decoded": encoded(decoded),
            "terms": [term.item() for term in terms],
        },
    }


def page_growth(run):
    """Return how dreams grew: before training and after at most ten of the epochs."""
    last = len(run.dreams) - 1
    epochs = torch.linspace(0, last, min(last, 10) + 1).round().int().tolist()
    dreams = torch.stack([run.dreams[epoch][:GROWN] for epoch in epochs])
    return {"epochs": epochs, "dreams": encoded((255 * dreams).round().byte())}


def read_template():
    """Return what stands before and after the model's slot in the page's template."""
    try:
        before, after = TEMPLATE.read_text(encoding="utf-8").split(SLOT)
        return before, after
    except (OSError, ValueError) as error:
        raise quest.JobError(
            f"{TEMPLATE} is missing or changed: git checkout -- dreams/plane.html"
        ) from error


def draw_page(run, beside=None):
    """Return the page of the run, and of a second one beside it: a text."""
    before, after = read_template()
    x, places = images_of_each_class(run, EACH)
    shown = {
        "dataset": run.settings.dataset,
        "classes": class_names(run),
        "colours": COLOURS,
        "digits": encoded((255 * x).round().byte()),
        "growth": page_growth(run),
        "models": [page_model(each, x, places) for each in (run, beside) if each],
    }
    filled = SLOT.replace("></", f">{json.dumps(shown)}</")
    return before + filled + after


# ---- The job and the command line ----------------------------------------------------
def file_of(picture, kind, **options):
    """Return a picture as the bytes of a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def make_gallery(folder, beside_folder=None):
    """Draw all that the model in `folder` allows; return the message of success."""
    run = Run(folder)
    no_page = why_no_page(run)
    beside = None
    if beside_folder is not None:
        beside = Run(beside_folder)
        check_beside(run, no_page, beside)

    first, *rest = draw_growth(run)
    milliseconds = [500] * len(rest) + [3000]
    contents = {
        "dream_growth.gif": file_of(
            first,
            "GIF",
            save_all=True,
            append_images=rest,
            duration=milliseconds,
            loop=0,
        ),
        "dream_mirror.png": file_of(draw_mirror(run), "PNG"),
    }
    if run.settings.latent_dim == 2:
        contents["dream_canvas.png"] = file_of(draw_canvas(run), "PNG")
        contents["dream_codes.png"] = file_of(draw_codes(run), "PNG")
    if no_page is None:
        contents["dream_plane.html"] = draw_page(run, beside).encode()

    files = quest.save_files(folder, contents)
    remove_others(folder, contents)
    message = f"The gallery is ready: {', '.join(files)}"
    return message if no_page is None else f"{message}. No page: {no_page}."


def check_beside(run, no_page, beside):
    """Raise JobError if the page cannot show the second model beside the first."""
    reason = no_page or why_no_page(beside)
    if reason is None and beside.settings.dataset != run.settings.dataset:
        reason = "the two models were trained on different data sets"
    if reason is not None:
        raise quest.JobError(f"--beside: {reason}.")


def remove_others(folder, contents):
    """Remove the pictures of an earlier model that this one does not have."""
    for name in PICTURES:
        if name not in contents:
            Path(folder, name).unlink(missing_ok=True)


def main(argv=None):
    """Run the command line `argv`, by default the process's own; return its code."""
    parser = argparse.ArgumentParser(
        prog="python -m dreams.gallery",
        description="Draw what a saved model has learned.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        nargs="?",
        default="dreams",
        help=f"folder of {MODEL} (default: %(default)s)",
    )
    parser.add_argument(
        "--beside", metavar="FOLDER", help="folder of a second model for the page"
    )
    args = parser.parse_args(argv)
    try:
        print(make_gallery(args.folder, args.beside))
        return 0
    except quest.JobError as error:
        print(f"dreams.gallery: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    quest.run_as_process(main, "dreams.gallery")
