"""What the gallery's pictures and its page's data show."""

import base64
import getpass
import math
import shutil
import socket

import pytest
import torch
from harness import (
    PICTURES,
    ROOT,
    data_of,
    expect_equal,
    expect_picture,
    expect_same_files,
    files_in,
    levels,
    levels_of,
)
from PIL import Image, ImageSequence
from torchvision.utils import make_grid

import quest_12_1 as quest
from dreams import gallery

TITLE = gallery.STRIP  # height of the text above a picture


@pytest.fixture
def saved(small_run):
    """All that the small run has saved."""
    return torch.load(small_run.output / "dream_model.pt")


@pytest.fixture
def model(saved):
    """The small run's model."""
    settings = quest.Settings(**saved["settings"])
    model = quest.VAE(settings.hidden, settings.latent_dim)
    model.load_state_dict(saved["model"])
    return model.eval().requires_grad_(False)


@pytest.fixture
def few(held_out):
    """The held-out digits of a small run, and their classes."""
    x, targets = held_out
    return x[:2000], targets[:2000]


@pytest.fixture
def drawn(small_gallery, monkeypatch):
    """What the gallery has drawn: a Run, the small run's."""
    monkeypatch.chdir(small_gallery.folder)
    return gallery.Run("runs/seed 3")


def digits_of_each_class(few, count):
    """The first `count` digits of each class, the classes in turn: 0 to 9, 0, ..."""
    x, targets = few
    of_class = [x[targets == label][:count] for label in range(10)]
    return torch.stack(of_class, dim=1).flatten(0, 1)


def halved(picture):
    """A picture of which each pixel was drawn 2 x 2: one of each four."""
    return picture[::2, ::2]


# ---- The pictures --------------------------------------------------------------------
def test_the_gallery_makes_five_files_and_names_each(small_gallery, small_run):
    made = {path.name for path in small_gallery.output.iterdir()}
    made -= {path.name for path in small_run.output.iterdir()}

    assert sorted(made) == PICTURES
    for name in PICTURES:
        assert f"runs/seed 3/{name}" in small_gallery.result.stdout
    assert small_gallery.result.stderr == ""


def test_the_gallery_leaves_the_model_and_its_dreams_as_they_are(
    small_gallery, small_run
):
    now = files_in(small_gallery.output)

    for name, data in files_in(small_run.output).items():
        assert name in now, f"{name} is gone"
        same = now[name] == data
        assert same, f"{name} is another than before the gallery"


def test_the_plane_holds_nearly_all_codes(drawn):
    """99 of 100; it is never narrower than from -4 to 4."""
    for spread in (0.1, 1.0, 20.0):
        drawn.mu = spread * torch.randn(10_000, 2)

        inside = (drawn.mu.abs() <= drawn.extent).all(dim=1).float().mean()

        assert inside >= 0.99, f"the plane holds {inside:.2%} of codes of std {spread}"
        assert drawn.extent >= 4
        assert drawn.extent <= max(4, spread * 3.5), "a plane that is mostly empty"


def test_the_canvas_shows_what_points_of_the_plane_decode_to(
    small_gallery, model, drawn
):
    cells, half = gallery.CELLS, drawn.extent
    centres = [(2 * (k + 0.5) / cells - 1) * half for k in range(cells)]
    plane = torch.tensor([[z1, z2] for z2 in reversed(centres) for z1 in centres])

    images = model.decode(plane).view(-1, 1, quest.SIDE, quest.SIDE)

    picture = levels(small_gallery.output / "dream_canvas.png")[TITLE:]
    expect_picture(picture, 255 * make_grid(images, nrow=cells)[0], "the canvas")


def test_the_mirror_shows_digits_above_what_their_codes_decode_to(
    small_gallery, model, few
):
    x = digits_of_each_class(few, 4)
    recon_x = model.decode(model.encode(x)[0])
    pairs = torch.cat((x, recon_x), dim=1).view(-1, 1, 2 * quest.SIDE, quest.SIDE)

    picture = levels(small_gallery.output / "dream_mirror.png")[TITLE:]

    columns, rows = 10, 4
    height, width = picture.shape[0] / 2, picture.shape[1] / 2
    tall = (height - 2 * quest.SIDE * rows) / (rows + 1)
    wide = (width - quest.SIDE * columns) / (columns + 1)
    assert tall == wide, "the pairs are not evenly spaced"
    assert tall > 0, "there is nothing between the pairs"
    between = {"padding": int(tall), "pad_value": math.nan}  # of any grey
    grid = 255 * make_grid(pairs, nrow=columns, **between)[0]
    expect_picture(halved(picture), grid, "the mirror")


def test_the_growth_shows_the_dreams_before_training_and_after_each_epoch(
    small_gallery, saved
):
    path = small_gallery.output / "dream_growth.gif"

    for number, dreams in enumerate(saved["dreams"]):
        frame = halved(levels(path, frame=number)[TITLE:])

        grid = 255 * make_grid(dreams)[0]
        assert frame.shape == grid.shape
        apart = (frame - grid).abs().mean()  # of a GIF's 256 colours some are missing
        assert apart < 2, f"frame {number} is {apart:.1f} levels off on average"


def test_the_growth_plays_each_frame_and_begins_again(small_gallery, saved):
    with Image.open(small_gallery.output / "dream_growth.gif") as animation:
        frames = [frame.info["duration"] for frame in ImageSequence.Iterator(animation)]

        assert len(frames) == len(saved["dreams"])
        assert min(frames) >= 100, f"a frame of {min(frames)} ms is hardly seen"
        assert frames[-1] > max(frames[:-1]), "the last one does not stay to be seen"
        assert animation.info["loop"] == 0, "it does not play for ever"


# ---- The codes -----------------------------------------------------------------------
def draw_codes_at(mu, targets, extent):
    """The levels of the codes' plane, (H, W, 3), and a function that finds a point."""
    picture = levels_of(gallery.draw_plane(mu, targets, extent), "RGB")
    half = picture.shape[0] / 2

    def place(z1, z2):
        return round(half - half * z2 / extent), round(half + half * z1 / extent)

    return picture, place


def colour_of(label):
    return torch.tensor(list(bytes.fromhex(gallery.COLOURS[label][1:])))


def test_a_code_is_a_dot_at_its_mu_in_the_colour_of_its_class():
    """z1 grows to the right, z2 upwards; there is next to nothing around a dot."""
    points = [(0.0, 0.5), (-3.8, -3.8), (2.6, 0.0), (0.4, 3.5)]
    for extent in (4, 9):
        for label in range(10):
            mu = torch.tensor(points)
            targets = torch.full((len(points),), label)

            picture, place = draw_codes_at(mu, targets, extent)

            for z1, z2 in points:
                row, column = place(z1, z2)
                patch = picture[row - 3 : row + 4, column - 3 : column + 4]
                ours = (patch == colour_of(label)).all(dim=2)
                assert ours[2:5, 2:5].any(), f"no dot of {label} at {z1}, {z2}"
                assert ours.sum() < 16, f"a large dot of {label} at {z1}, {z2}"


def test_a_code_beyond_the_plane_is_not_drawn():
    nothing = draw_codes_at(torch.zeros(0, 2), torch.zeros(0).long(), 4)[0]

    beyond = draw_codes_at(torch.full((5, 2), 9.0), torch.arange(5), 4)[0]

    expect_equal({"the plane": beyond}, {"the plane": nothing})


ANGLES = [0.1 + turn * math.pi / 6 for turn in range(12)]  # where circles are tried


def expect_circles(lit, place):
    """Expect circles of the radii 1, 2 and 3 where `lit` is true, at each angle."""
    for angle in ANGLES:
        for radius in (1, 2, 3):
            row, column = place(radius * math.cos(angle), radius * math.sin(angle))
            near = lit[row - 1 : row + 2, column - 1 : column + 2]
            assert near.any(), f"no circle of radius {radius} at {angle:.1f} radians"


@pytest.mark.parametrize("extent", [4, 10])
def test_circles_show_where_the_dreams_come_from(extent):
    """At 1, 2 and 3 standard deviations of N(0, I)."""
    picture, place = draw_codes_at(torch.zeros(0, 2), torch.zeros(0).long(), extent)
    lit = picture.amax(dim=2) > 100

    expect_circles(lit, place)
    for angle in ANGLES:
        for radius in (0, 0.5, 1.5, 2.5, 3.5):
            row, column = place(radius * math.cos(angle), radius * math.sin(angle))
            assert not lit[row, column], f"something at {radius}, {angle:.1f} radians"


def test_codes_do_not_hide_the_circles():
    """Drawn twice, with codes of another colour all over the circles: what lights up
    and stays the same is not a code."""
    angles = torch.linspace(0, 2 * math.pi, 3000)
    circle = torch.stack((angles.cos(), angles.sin()), dim=1)
    mu = torch.cat([radius * circle for radius in (1, 2, 3)])
    first, second = (torch.full((len(mu),), label) for label in (5, 2))

    one, place = draw_codes_at(mu, first, 4)
    other, _ = draw_codes_at(mu, second, 4)

    apart = (colour_of(5) - colour_of(2)).abs().max()
    same = (one - other).abs().amax(dim=2) < apart / 2
    expect_circles(same & (one.amax(dim=2) > 100), place)


@pytest.mark.parametrize("seed", range(5))
def test_classes_that_share_their_place_are_shown_alike(seed):
    """Drawn one class after the other, the last would hide the first: 5 times as many
    of its pixels would be seen. In the order of the images it is 1.1 to 1.4."""
    torch.manual_seed(seed)
    mu = 0.2 * torch.randn(10_000, 2)
    targets = 4 + 5 * torch.randint(2, (10_000,))

    picture, _ = draw_codes_at(mu, targets, 4)

    fours, nines = (
        (picture == colour_of(label)).all(dim=2).sum().item() for label in (4, 9)
    )
    seen = f"{fours} pixels of 4, {nines} of 9"
    assert min(fours, nines) > 500, seen
    assert max(fours, nines) < 2 * min(fours, nines), seen


def test_the_codes_show_each_held_out_digit_of_the_model(small_gallery, model, few):
    x, targets = few
    mu = model.encode(x)[0]
    extent = max(4, math.ceil(mu.abs().amax(dim=1).quantile(0.99).item()))

    picture = levels(small_gallery.output / "dream_codes.png", "RGB")[TITLE:]

    expected, _ = draw_codes_at(mu, targets, extent)
    legend = quest.SIDE  # the rows in which it is
    expect_equal({"codes": picture[legend:]}, {"codes": expected[legend:]})


def test_the_last_of_10_000_codes_is_drawn(drawn):
    """Of so many digits as MNIST holds out, it alone is apart."""
    drawn.mu = torch.zeros(10_000, 2)
    drawn.targets = torch.arange(10_000) % 10
    without = levels_of(gallery.draw_codes(drawn), "RGB")
    drawn.mu[-1] = torch.tensor([2.5, -3.0])

    picture = levels_of(gallery.draw_codes(drawn), "RGB")

    same = torch.equal(picture, without)
    assert not same, "the last code has no dot"


def test_the_codes_legend_is_a_digit_of_each_class_in_its_colour(small_gallery, few):
    picture = levels(small_gallery.output / "dream_codes.png", "RGB")[TITLE:]

    for label, x in enumerate(digits_of_each_class(few, 1)):
        left = label * quest.SIDE
        cell = picture[: quest.SIDE, left : left + quest.SIDE]
        expected = colour_of(label) * x.view(quest.SIDE, quest.SIDE, 1)
        expect_picture(cell, expected, f"the legend's {label}")


def test_the_colours_of_the_classes_differ_for_every_eye():
    """Brightness counts, which colour-blind eyes see as others do: black is far off."""
    colours = torch.stack([colour_of(label) for label in range(10)]).float()

    nearest, darkest = torch.pdist(colours).min(), colours.mean(dim=1).min()
    assert nearest > 60, f"two colours are only {nearest:.0f} apart"
    assert darkest > 60, f"a colour is nearly black: {darkest:.0f} of 255"


# ---- The page's data -----------------------------------------------------------------
def decoded(text, shape, dtype=torch.float32):
    """The tensor behind base64 text."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).view(shape)


@pytest.fixture
def page(small_gallery):
    """The page of the small run, a text."""
    path = small_gallery.output / "dream_plane.html"
    if not path.exists():
        pytest.skip(f"this model has no page: {small_gallery.result.stdout}")
    return path.read_text(encoding="utf-8")


def test_the_page_is_the_template_with_its_slot_filled(page):
    template = gallery.TEMPLATE.read_bytes()
    before, slot, after = template.partition(gallery.SLOT.encode())

    assert slot, "the template has no slot"
    assert page.encode().startswith(before), "the page's beginning is another"
    assert page.encode().endswith(after), "the page's end is another"


def test_the_page_tells_data_set_settings_and_losses(page, saved):
    shown = data_of(page)
    (model,) = shown["models"]

    assert shown["dataset"] == "MNIST"
    assert shown["classes"] == [str(label) for label in range(10)]
    assert shown["colours"] == list(gallery.COLOURS)
    assert model["settings"] == saved["settings"]
    assert model["losses"] == saved["losses"][-1]


def test_the_page_holds_the_model_to_the_last_bit(page, saved):
    (model,) = data_of(page)["models"]

    held = {
        name: decoded(text, saved["model"][name].shape)
        for name, text in model["tensors"].items()
    }
    expect_equal(held, saved["model"])


def test_the_page_holds_100_digits_of_each_class_and_their_codes(page, model, few):
    shown = data_of(page)
    (of_model,) = shown["models"]

    x = decoded(shown["digits"], (-1, quest.PIXELS), torch.uint8) / 255

    expect_equal({"digits": x}, {"digits": digits_of_each_class(few, 100)})
    codes = decoded(of_model["codes"], (len(x), 4))
    torch.testing.assert_close(codes, torch.cat(model.encode(x), dim=1))


def test_the_page_holds_an_example_of_what_pytorch_computes(page, model, few):
    """Of the first digit: its code decoded, and the loss with its two parts."""
    (of_model,) = data_of(page)["models"]
    x = digits_of_each_class(few, 1)[:1]

    recon_x = decoded(of_model["example"]["decoded"], (1, quest.PIXELS))
    terms = of_model["example"]["terms"]

    mu, logvar = model.encode(x)
    torch.testing.assert_close(recon_x, model.decode(mu))
    beta = of_model["settings"]["beta"]
    expected = quest.loss_terms(recon_x, x, mu, logvar, beta)
    assert terms == pytest.approx([term.item() for term in expected], rel=1e-5)


def model_of_the_page(drawn):
    """What the page of a Run tells of its model."""
    if gallery.why_no_page(drawn):
        pytest.skip("this model has no page")
    (model,) = data_of(gallery.draw_page(drawn))["models"]
    return model


def test_the_page_tells_the_losses_of_the_last_epoch_even_if_they_rise(drawn):
    names = drawn.losses[-1]
    drawn.losses = [dict.fromkeys(names, 100.0), dict.fromkeys(names, 200.0)]

    told = model_of_the_page(drawn)["losses"]

    assert told == drawn.losses[-1], f"it tells {told}, after 100 and then 200"


def test_beta_reaches_the_page(drawn):
    drawn.settings = quest.Settings(**vars(drawn.settings) | {"beta": 7.5})

    model = model_of_the_page(drawn)

    assert model["settings"]["beta"] == 7.5
    loss, bce, kld = model["example"]["terms"]
    assert loss == pytest.approx(bce + 7.5 * kld, rel=1e-5)


def test_the_page_s_extent_is_that_of_the_pictures(page, drawn):
    (model,) = data_of(page)["models"]

    assert model["extent"] == drawn.extent


def texts_in(data):
    """All names and texts in the page's data, but for numbers in base64."""
    if isinstance(data, dict):
        return [text for item in data.items() for text in texts_in(item)]
    if isinstance(data, (list, tuple)):
        return [text for item in data for text in texts_in(item)]
    return [data] if isinstance(data, str) and len(data) < 500 else []


def test_the_page_holds_nothing_of_its_author_s_machine(page, small_gallery):
    words = {
        "a folder": str(small_gallery.folder),
        "the clone's folder": str(ROOT),
        "the output folder": "runs/seed 3",
        "the user": getpass.getuser(),
        "the host": socket.gethostname(),
        "PyTorch's version": torch.__version__,
    }

    texts = texts_in(data_of(page))

    assert "MNIST" in texts
    for what, word in words.items():
        for text in texts:
            assert word not in text, f"the page tells {what}: {text}"


# ---- A drawing that fails ------------------------------------------------------------
def test_a_drawing_that_fails_leaves_model_and_earlier_pictures_whole(
    small_gallery, tmp_path, monkeypatch
):
    shutil.copytree(small_gallery.output, tmp_path / "out")
    before = files_in(tmp_path / "out")
    monkeypatch.chdir(small_gallery.folder)

    def broken(*_, **__):
        raise ZeroDivisionError("a bug in a drawing")

    for name in ("draw_growth", "draw_mirror", "draw_canvas", "draw_codes"):
        with monkeypatch.context() as patch:
            patch.setattr(gallery, name, broken)
            with pytest.raises(ZeroDivisionError):
                gallery.main([str(tmp_path / "out")])

    expect_same_files(tmp_path / "out", before)
