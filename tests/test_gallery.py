"""The gallery: pictures that show what they claim, the same for the same seed."""

import base64
import itertools
import json
import re

import pytest
import torch
from harness import ROOT, TEMPLATE, draws, levels, prepare, run_small
from PIL import Image, ImageSequence

import quest_12_1 as quest

PICTURES = ["dream_canvas.png", "dream_codes.png", "dream_growth.gif", "dream_mirror.png", "dream_sample.png"]
NAMES = [*PICTURES[:4], "dream_model.pt", "dream_plane.html", "dream_sample.png"]


@pytest.fixture
def kept(gallery, model):
    """The model that the gallery run has kept."""
    model.load_state_dict(torch.load(gallery[0] / "dream_model.pt"))
    return model.requires_grad_(False)


def test_the_gallery_saves_five_pictures_the_model_and_its_page_and_names_each(gallery):
    folder, answer = gallery
    assert answer["files"] == [f"runs/seed 3/{name}" for name in NAMES]
    assert answer["message"].endswith("The dream is ready: " + ", ".join(answer["files"]))
    assert {folder / name for name in NAMES} == set(folder.iterdir())
    shapes = [tuple(levels(folder / name).shape) for name in PICTURES]
    assert shapes == [(602, 602), (602, 602), (242, 242), (244, 324), (242, 242)]
    assert sum((folder / name).stat().st_size for name in PICTURES) < 1_200_000


def test_the_same_seed_gives_the_same_bytes_with_and_without_the_gallery_and_another_seed_others(gallery, tmp_path):
    folder = prepare(tmp_path, gallery=True)
    jobs = {"plain": ["--seed", "3"], "again": ["--gallery", "--seed", "3"], "other": ["--gallery", "--seed", "4"]}
    for output, job in jobs.items():
        run_small(folder, "--epochs", "2", "--output", output, *job)
    folders = [gallery[0], *(folder / output for output in jobs)]
    first, plain, again, other = ({path.name: path.read_bytes() for path in saved.iterdir()} for saved in folders)
    assert plain == {"dream_sample.png": first["dream_sample.png"]} and other.keys() == first.keys() == again.keys()
    for name in set(NAMES) - {"dream_plane.html"}:  # the page also tells the time of training
        assert again[name] == first[name] != other[name], name


def test_the_losses_told_are_those_of_the_kept_model_on_held_out_digits_with_the_seed_s_noise(gallery, kept, held_out):
    """Recomputed from outside, up to the rounding of the CPU's products to bfloat16."""
    x, eps = held_out[0][:2000], draws(3, 2000)[1]
    mu, logvar = kept.encode(x)
    terms = quest.loss_terms(kept.decode(mu + torch.exp(logvar / 2) * eps), x, mu, logvar)
    expected = [term.item() / 2000 for term in terms]
    assert list(gallery[1]["held_out_loss"].values()) == pytest.approx(expected, abs=0.05)


def test_the_kept_model_is_the_one_that_dreamt_the_sample_from_the_seed_s_points(gallery, kept):
    sample = levels(gallery[0] / "dream_sample.png").float()
    assert (sample - 255 * quest.make_grid(quest.dream(kept, draws(3, 0)[0]))[0]).abs().max() < 6


def test_the_page_holds_the_run_the_model_and_ten_digits_of_each_class(gallery, kept, held_out):
    folder, answer = gallery
    page = (folder / "dream_plane.html").read_text()
    before, after = TEMPLATE.read_text().split("const run = null;")
    run = json.loads(page.removeprefix(before + "const run = ").removesuffix(";" + after))
    told = {key: run[key] for key in ("seed", "epochs", "held_out_loss", "beta", "classes")}
    assert told == {
        "seed": 3, "epochs": 2, "held_out_loss": answer["held_out_loss"], "beta": 1, "classes": list("0123456789")
    }  # fmt: skip
    assert base64.b64decode(run["codes"]) == (folder / "dream_codes.png").read_bytes()
    data = {name: bytearray(base64.b64decode(text)) for name, text in run["tensors"].items()}
    x = torch.frombuffer(data.pop("digits"), dtype=torch.uint8).view(100, 784) / 255
    tensors = {name: torch.frombuffer(data[name], dtype=torch.float32) for name in data}
    for name, weight in kept.state_dict().items():
        assert torch.equal(tensors[name], weight.flatten())
    of_class = [held_out[0][held_out[1] == label][:10] for label in range(10)]
    assert torch.equal(x.view(10, 10, 784), torch.stack(of_class, dim=1))  # the classes in turn
    code = torch.cat(kept.encode(x[:1]))
    torch.testing.assert_close(tensors["encoded"], code.flatten(), atol=1e-5, rtol=0)
    torch.testing.assert_close(tensors["decoded"], kept.decode(code[0]), atol=1e-5, rtol=0)


def test_the_canvas_shows_cell_by_cell_what_points_of_the_plane_decode_to(gallery, kept):
    centres = [-3.8 + 0.4 * k for k in range(20)]
    plane = torch.tensor([[z1, z2] for z2, z1 in itertools.product(centres[::-1], centres)])  # z2 falls row by row
    torch.testing.assert_close(quest.latent_grid(), plane)
    canvas = levels(gallery[0] / "dream_canvas.png").float()
    assert (canvas - 255 * quest.make_grid(quest.dream(kept, plane), nrow=20)[0]).abs().max() < 6


def test_the_codes_are_dots_in_the_colours_of_the_classes_on_the_canvas_s_frame_with_three_circles(held_out):
    """A dot at a point of the plane covers that point, and little else; beyond the plane there is none."""
    x, targets = held_out[0][:300], held_out[1][:300]
    mu = torch.full((300, 2), 9.0)
    mu[:3] = torch.tensor([[0.0, 0.5], [-3.8, -3.8], [2.6, 0.0]])
    picture = (255 * quest.draw_codes(mu, x, targets)).round()
    assert picture.shape == (3, 602, 602)
    palette = torch.tensor([list(bytes.fromhex(colour)) for colour in quest.COLOURS])
    for (z1, z2), label in zip(mu[:3].tolist(), targets):
        right, down = round(301 + 75.25 * z1), round(301 - 75.25 * z2)
        patch = picture[:, down - 3 : down + 4, right - 3 : right + 4]
        ours = (patch == palette[label].view(3, 1, 1)).all(dim=0)
        assert ours[2:5, 2:5].any() and 4 < ours.sum() < 10
    assert len(palette.unique(dim=0)) == 10
    white = (picture == 255).all(dim=0)
    white[:28] = False  # where the legend is
    distances = (white.nonzero() - 301).float().norm(dim=1) / 75.25
    assert ((distances - distances.round()).abs() < 0.03).all()
    assert (distances.round().int().bincount() > torch.tensor([-1, 300, 600, 900])).all()
    for label in range(10):  # the legend
        shown = picture[:, :28, 28 * label : 28 * label + 28]
        digit = x[targets == label][0].view(28, 28) * palette[label].view(3, 1, 1)
        assert (shown - digit).abs().max() <= 1


def test_the_mirror_shows_the_first_four_digits_of_each_class_above_their_reconstructions(gallery, kept, held_out):
    x, targets = held_out
    of_class = [[index for index in range(200) if targets[index] == label] for label in range(10)]
    digits = x[[of_class[label][nth] for nth in range(4) for label in range(10)]]
    pairs = torch.cat((digits, kept.decode(kept.encode(digits)[0])), dim=1).view(40, 1, 56, 28)
    expected = quest.make_grid(pairs, nrow=10, padding=4, pad_value=0.35)[0]
    assert (levels(gallery[0] / "dream_mirror.png") - 255 * expected).abs().max() < 8


def test_the_growth_shows_the_sample_s_dreams_before_training_and_after_each_epoch(gallery):
    growth = gallery[0] / "dream_growth.gif"
    with Image.open(growth) as animation:
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(animation)] == [500, 500, 3000]
    frames, sample = [levels(growth, frame=n) for n in range(3)], levels(gallery[0] / "dream_sample.png")
    distances = [(frame - sample).abs().float().mean() for frame in frames]
    torch.manual_seed(3)
    untrained = quest.dream(quest.VAE().requires_grad_(False), draws(3, 0)[0])
    assert (frames[0] - 255 * quest.make_grid(untrained)[0]).abs().max() < 3
    assert distances[0] > 50 > distances[1] > 1 > distances[2]  # from grey noise to the sample itself


def test_the_committed_pictures_are_those_of_the_readme():
    shown = set(re.findall(r"\(dreams/(example_\w+\.\w+)\)", (ROOT / "README.md").read_text()))
    assert shown == {path.name for path in (ROOT / "dreams").glob("example_*")}
