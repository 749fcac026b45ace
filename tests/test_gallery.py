"""The gallery: pictures that show what they claim, the same for the same seed."""

import base64
import json

import pytest
import torch
from harness import TEMPLATE, draws, levels
from PIL import Image, ImageSequence

import quest_12_1 as quest

PICTURES = ["dream_canvas.png", "dream_codes.png", "dream_growth.gif", "dream_mirror.png", "dream_sample.png"]
NAMES = [*PICTURES[:4], "dream_model.pt", "dream_plane.html", "dream_sample.png"]


@pytest.fixture
def kept(gallery, model):
    """The model that the gallery run has kept."""
    model.load_state_dict(torch.load(gallery[0] / "dream_model.pt"))
    return model.requires_grad_(False)


def apart(path, images, **layout):
    """The greatest distance of a picture's pixels, from 0 to 255, from a grid of the images."""
    return (levels(path) - 255 * quest.make_grid(images, **layout)[0]).abs().max()


def test_the_gallery_saves_five_pictures_the_model_and_its_page_and_names_each(gallery):
    folder, answer = gallery
    assert answer["files"] == [f"runs/seed 3/{name}" for name in NAMES]
    assert answer["message"].endswith("The dream is ready: " + ", ".join(answer["files"]))
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    shapes = [tuple(levels(folder / name).shape) for name in PICTURES]
    assert shapes == [(602, 602), (602, 602), (242, 242), (244, 324), (242, 242)]


def test_the_kept_model_has_the_losses_told_and_dreamt_the_sample_with_the_seed_s_noise(gallery, kept, held_out):
    """Recomputed from outside, up to the rounding of the CPU's products to bfloat16."""
    x, (z, eps) = held_out[0][:2000], draws(3, 2000)
    mu, logvar = kept.encode(x)
    terms = quest.loss_terms(kept.decode(mu + torch.exp(logvar / 2) * eps), x, mu, logvar)
    told = list(gallery[1]["losses"][-1].values())[1:]
    assert told == pytest.approx([term.item() / 2000 for term in terms], abs=0.05)
    assert apart(gallery[0] / "dream_sample.png", quest.dream(kept, z)) < 6


def test_the_page_holds_what_it_shows_of_the_run_the_model_and_ten_digits_of_each_class_alone(gallery, kept, held_out):
    folder, answer = gallery
    page, (before, after) = (folder / "dream_plane.html").read_text(), TEMPLATE.read_text().split("const run = null;")
    run = json.loads(page.removeprefix(before + "const run = ").removesuffix(";" + after))
    shown = {"seed": 3, "epochs": 2, "beta": 1, "extent": 4, "cells": 20}
    shown |= answer["losses"][-1]
    assert {key: run[key] for key in shown} == shown
    assert run.keys() - shown.keys() == {"codes", "tensors"}  # so nothing of its author's machine
    assert base64.b64decode(run["codes"]) == (folder / "dream_codes.png").read_bytes()
    data = {name: bytearray(base64.b64decode(text)) for name, text in run["tensors"].items()}
    x = torch.frombuffer(data.pop("digits"), dtype=torch.uint8).view(100, 784) / 255
    tensors = {name: torch.frombuffer(data[name], dtype=torch.float32) for name in data}
    assert all(torch.equal(tensors[name], weight.flatten()) for name, weight in kept.state_dict().items())
    of_class = [held_out[0][held_out[1] == label][:10] for label in range(10)]
    assert torch.equal(x.view(10, 10, 784), torch.stack(of_class, dim=1))  # the classes in turn
    code = torch.cat(kept.encode(x[:1]))
    torch.testing.assert_close(tensors["encoded"], code.flatten(), atol=1e-5, rtol=0)
    torch.testing.assert_close(tensors["decoded"], kept.decode(code[0]), atol=1e-5, rtol=0)


def test_the_canvas_shows_cell_by_cell_what_points_of_the_plane_decode_to(gallery, kept):
    centres = [-3.8 + 0.4 * k for k in range(20)]
    plane = torch.tensor([[z1, z2] for z2 in centres[::-1] for z1 in centres])  # z2 falls row by row
    assert apart(gallery[0] / "dream_canvas.png", quest.dream(kept, plane), nrow=20) < 1


def test_the_codes_are_dots_in_the_colours_of_the_classes_on_the_canvas_s_frame(held_out):
    """A dot at a point of the plane covers that point, and little else; beyond the plane there is none."""
    mu, targets, digits = torch.full((300, 2), 9.0), held_out[1][:300], torch.rand(10, 784)
    mu[:3] = torch.tensor([[0.0, 0.5], [-3.8, -3.8], [2.6, 0.0]])
    picture = (255 * quest.draw_codes(mu, targets, digits, 602)).round()
    palette = torch.tensor([list(bytes.fromhex(colour)) for colour in quest.COLOURS])
    for (z1, z2), label in zip(mu[:3].tolist(), targets):
        right, down = round(301 + 75.25 * z1), round(301 - 75.25 * z2)
        patch = picture[:, down - 3 : down + 4, right - 3 : right + 4]
        ours = (patch == palette[label].view(3, 1, 1)).all(dim=0)
        assert ours[2:5, 2:5].any() and 4 < ours.sum() < 10
    legend = torch.cat([colour.view(3, 1, 1) * x.view(28, 28) for colour, x in zip(palette, digits)], dim=2)
    assert len(palette.unique(dim=0)) == 10 and (picture[:, :28, :280] - legend).abs().max() <= 1
    assert (picture[:, 28:] > 0).any(dim=0).sum() < 30  # of three dots


def test_of_two_classes_that_share_their_place_the_codes_show_both_alike():
    mu, targets = 0.2 * torch.randn(10_000, 2), torch.randint(2, (10_000,)) * 5 + 4  # 4s and 9s
    picture = (255 * quest.draw_codes(mu, targets, torch.zeros(10, 784), 602)).round()
    shown = [(picture.permute(1, 2, 0) == torch.tensor([*bytes.fromhex(quest.COLOURS[k])])).all(dim=2) for k in (4, 9)]
    assert 500 < shown[0].sum() < 1.1 * shown[1].sum() < 1.3 * shown[0].sum()


def test_mirror_and_codes_show_held_out_digits_above_their_reconstructions_and_at_their_mu(gallery, kept, held_out):
    x, targets = held_out[0][:2000], held_out[1][:2000]
    digits = torch.stack([x[targets == label][:4] for label in range(10)], dim=1).view(40, 784)  # four of each class
    pairs = torch.cat((digits, kept.decode(kept.encode(digits)[0])), dim=1).view(40, 1, 56, 28)
    assert apart(gallery[0] / "dream_mirror.png", pairs, nrow=10, padding=4, pad_value=0.35) < 1
    codes = 255 * quest.draw_codes(kept.encode(x)[0], targets, digits[:10], 602).permute(1, 2, 0)
    assert (levels(gallery[0] / "dream_codes.png", "RGB") - codes).abs().mean() < 0.1


def test_the_growth_shows_the_sample_s_dreams_before_training_and_after_each_epoch(gallery):
    growth = gallery[0] / "dream_growth.gif"
    with Image.open(growth) as animation:
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(animation)] == [500, 500, 3000]
    torch.manual_seed(3)
    assert apart(growth, quest.dream(quest.VAE().requires_grad_(False), draws(3, 0)[0])) < 3
    frames, sample = [levels(growth, frame=n) for n in range(3)], levels(gallery[0] / "dream_sample.png")
    distances = [(frame - sample).abs().float().mean() for frame in frames]
    assert distances[0] > 50 > distances[1] > 1 > distances[2]  # from grey noise to the sample itself
