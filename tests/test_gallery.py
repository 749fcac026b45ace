"""The gallery: pictures that show what they claim, the same for the same seed."""

import base64
import itertools
import json
import re
import shutil

import torch
from harness import ROOT, SCRIPT, levels, run_small
from PIL import Image, ImageSequence
from torch.distributions import Normal

import quest_12_1 as quest

PICTURES = ["dream_atlas.png", "dream_canvas.png", "dream_growth.gif", "dream_mirror.png", "dream_sample.png"]
NAMES = [*PICTURES[:4], "dream_model.js", "dream_model.pt", "dream_sample.png", "plane.html"]


def test_the_gallery_saves_five_pictures_the_model_and_its_page_and_names_each(gallery):
    folder, answer = gallery
    assert answer["files"] == [f"runs/seed 0/{name}" for name in NAMES]
    assert answer["message"].endswith("The dream is ready: " + ", ".join(answer["files"]))
    assert {folder / name for name in NAMES} == set(folder.iterdir())
    shapes = [tuple(levels(folder / name).shape) for name in PICTURES]
    assert shapes == [(602, 602), (602, 602), (242, 242), (244, 324), (242, 242)]
    assert sum((folder / name).stat().st_size for name in PICTURES) < 1_200_000
    assert (folder / "plane.html").read_bytes() == (ROOT / "dreams" / "plane.html").read_bytes()


def test_the_same_seed_gives_the_same_bytes_with_and_without_the_gallery_and_another_seed_others(gallery, folder):
    shutil.copy(SCRIPT, folder)  # alone, without its repository, it has no page but all else
    jobs = {"plain": [], "again": ["--gallery"], "other": ["--gallery", "--seed", "1"]}
    for output, job in jobs.items():
        run_small(folder, "--epochs", "2", "--output", output, *job, script=folder / SCRIPT.name)
    folders = [gallery[0], *(folder / output for output in jobs)]
    first, plain, again, other = ({path.name: path.read_bytes() for path in saved.iterdir()} for saved in folders)
    del first["plane.html"]
    assert plain == {"dream_sample.png": first["dream_sample.png"]} and again == first
    assert other.keys() == first.keys() and all(other[name] != first[name] for name in first)


def test_the_model_is_kept_for_pytorch_and_for_the_page_and_is_the_one_that_drew_the_pictures(gallery, model, tmp_path):
    folder, _ = gallery
    kept = torch.load(folder / "dream_model.pt")
    model.load_state_dict(kept)
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    quest.save_image(quest.dream(model, z), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (folder / "dream_sample.png").read_bytes()
    script = json.loads(re.fullmatch(r"const dreamModel = (\{.*\});\n", (folder / "dream_model.js").read_text())[1])
    assert script.pop("BETA") == 1 and set(script) == set(kept)
    for name, text in script.items():
        values = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)
        assert torch.equal(values, kept[name].flatten())


def test_canvas_and_atlas_show_cell_by_cell_what_a_point_decodes_to_and_who_lives_there(model, monkeypatch, tmp_path):
    """In the atlas, that is the first digit whose mu lies in the cell, in the colour of its class."""
    mu, x, targets = 1.5 * torch.randn(300, 2), torch.rand(300, 784), torch.randint(10, (300,))
    mu[:2] = torch.tensor([[9.0, -9.0], [9.0, 9.0]])  # beyond the last cell's centre, in the corners on the right
    monkeypatch.setattr(model, "encode", lambda x: (mu[: len(x)], None))
    quest.save_gallery(tmp_path, model, x, targets, [torch.rand(64, 1, 28, 28)])

    shares, canvas, atlas = torch.linspace(0, 1, 41), [], []
    edges, middles = Normal(0, 1).icdf(shares[::2]), Normal(0, 1).icdf(shares[1::2])  # from minus to plus infinity
    palette = torch.tensor([list(bytes.fromhex(colour)) for colour in quest.COLOURS]) / 255
    for z2, z1 in itertools.product(range(19, -1, -1), range(20)):  # z2 falls row by row, z1 grows to the right
        canvas.append(model.decode(middles[[z1, z2]]).view(1, 28, 28))
        inside = (edges[[z1, z2]] <= mu) & (mu < edges[[z1 + 1, z2 + 1]])
        first = inside.all(dim=1).nonzero().flatten()[:1]
        atlas.append((palette[targets[first]].view(-1, 3, 1, 1) * x[first].view(-1, 1, 28, 28)).sum(dim=0))
    assert torch.equal(quest.latent_atlas(mu, x, targets), torch.stack(atlas)) and atlas[399].any() and atlas[19].any()
    for name, images in {"canvas": canvas, "atlas": atlas}.items():
        pixels = levels(tmp_path / f"dream_{name}.png", "RGB").movedim(2, 0)
        assert (pixels - 255 * quest.make_grid(images, nrow=20)).abs().max() <= 0.51


def test_the_mirror_shows_the_first_four_digits_of_each_class_above_their_reconstructions(model, held_out):
    x, targets = held_out
    pairs = quest.reconstructions(model, x, targets)
    assert pairs.shape == (40, 1, 56, 28)
    shown, mirrored = pairs.view(40, 2, 784).unbind(dim=1)
    of_class = [[index for index in range(200) if targets[index] == label] for label in range(10)]
    expected = x[[of_class[label][nth] for nth in range(4) for label in range(10)]]
    assert torch.equal(shown, expected)
    torch.testing.assert_close(mirrored, model.decode(model.encode(expected)[0]))


def test_the_growth_shows_the_sample_s_dreams_before_training_and_after_each_epoch(gallery, model):
    growth = gallery[0] / "dream_growth.gif"
    with Image.open(growth) as animation:
        assert [frame.info["duration"] for frame in ImageSequence.Iterator(animation)] == [500, 500, 3000]
    frames, sample = [levels(growth, frame=n) for n in range(3)], levels(gallery[0] / "dream_sample.png")
    distances = [(frame - sample).abs().float().mean() for frame in frames]
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))  # the same points on every device
    assert (frames[0] - 255 * quest.make_grid(quest.dream(model, z))[0]).abs().max() <= 1
    assert distances[0] > 50 > distances[1] > 1 > distances[2]  # from grey noise to the sample itself
