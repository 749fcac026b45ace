"""The gallery: pictures that show what they claim, the same for the same seed."""

import itertools
import json

import pytest
import torch
from harness import run_small
from PIL import Image

import quest_12_1 as quest

NAMES = ["dream_sample.png", "dream_canvas.png", "dream_atlas.png", "dream_mirror.png", "dream_growth.gif"]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, unpacked):
    """A gallery run of two epochs; returns (folder, its result)."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "data").symlink_to(unpacked / "data")
    result = run_small(folder, "--gallery", "--json", "--epochs", "2")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


@pytest.fixture(scope="module")
def held_out(mnist):
    """The 10,000 held-out digits, (10000, 784), and their classes."""
    return quest.images_on("cpu", mnist[1]), mnist[1].targets


def levels(path, mode="L"):
    """A picture's pixels, from 0 to 255: (height, width), or (height, width, 3)."""
    with Image.open(path) as image:
        return torch.tensor(list(image.convert(mode).tobytes())).view(*image.size[::-1], -1).squeeze(-1)


def test_the_gallery_saves_five_whole_pictures_and_names_each_in_the_message(gallery):
    folder, answer = gallery
    files = [folder / "dreams" / name for name in NAMES]
    assert answer["files"] == [f"dreams/{name}" for name in NAMES] and ", ".join(answer["files"]) in answer["message"]
    assert set(files) == set((folder / "dreams").iterdir())
    assert [levels(file).shape for file in files] == [(242, 242), (602, 602), (602, 602), (244, 324), (242, 242)]
    assert sum(file.stat().st_size for file in files) < 1_200_000


def test_the_same_seed_gives_the_same_bytes_with_and_without_the_gallery_and_another_seed_others(gallery, folder):
    first, dreams = gallery[0] / "dreams", folder / "dreams"
    assert run_small(folder, "--epochs", "2").returncode == 0
    assert [path.name for path in dreams.iterdir()] == ["dream_sample.png"]
    assert (dreams / "dream_sample.png").read_bytes() == (first / "dream_sample.png").read_bytes()
    assert run_small(folder, "--epochs", "2", "--gallery").returncode == 0
    assert all((dreams / name).read_bytes() == (first / name).read_bytes() for name in NAMES)
    assert run_small(folder, "--epochs", "2", "--gallery", "--seed", "1").returncode == 0
    assert all((dreams / name).read_bytes() != (first / name).read_bytes() for name in NAMES)


def test_canvas_and_atlas_show_cell_by_cell_what_a_point_decodes_to_and_who_lives_there(model, held_out, tmp_path):
    quest.save_gallery(tmp_path, model, *held_out, [torch.rand(64, 1, 28, 28)])
    pixels = levels(tmp_path / "dream_canvas.png")
    normal = torch.distributions.Normal(0, 1)
    for row, column in ((0, 0), (0, 19), (7, 12), (19, 0)):
        z1 = normal.icdf(torch.tensor((column + 0.5) / 20))
        z2 = normal.icdf(torch.tensor((19 - row + 0.5) / 20))  # upwards
        cell = pixels[2 + 30 * row : 30 + 30 * row, 2 + 30 * column : 30 + 30 * column]
        expected = model.decode(torch.stack((z1, z2))[None]).view(28, 28) * 255
        assert (cell - expected).abs().max() <= 0.51
    assert len(torch.unique(quest.latent_grid(), dim=0)) == 400

    atlas = levels(tmp_path / "dream_atlas.png", "RGB")[2:].unfold(0, 28, 30)[:, 2:].unfold(1, 28, 30).flatten(0, 1)
    expected = quest.latent_atlas(model.encode(held_out[0])[0], *held_out)
    assert expected.any() and (atlas - 255 * expected).abs().max() <= 0.51


def test_each_cell_of_the_atlas_shows_the_first_digit_whose_mu_lies_in_it_in_the_colour_of_its_class():
    torch.manual_seed(0)
    mu, x, targets = 1.5 * torch.randn(300, 2), torch.rand(300, 784), torch.randint(10, (300,))
    mu[0], mu[1] = torch.tensor([9.0, -9.0]), torch.tensor([9.0, 9.0])  # beyond the last cell's centre
    atlas = quest.latent_atlas(mu, x, targets)
    assert atlas.shape == (400, 3, 28, 28)
    edges = torch.distributions.Normal(0, 1).icdf(torch.linspace(0, 1, 21))  # from minus to plus infinity
    for index, (row, column) in enumerate(itertools.product(range(20), range(20))):
        inside = (edges[column] <= mu[:, 0]) & (mu[:, 0] < edges[column + 1])
        inside &= (edges[19 - row] <= mu[:, 1]) & (mu[:, 1] < edges[20 - row])
        if inside.any():
            first = inside.nonzero()[0, 0]
            colour = torch.tensor(quest.COLOURS[targets[first]]).view(3, 1, 1) / 255
            assert torch.equal(atlas[index], x[first].view(1, 28, 28) * colour)
        else:
            assert not atlas[index].any()
    assert atlas[399].any() and atlas[19].any()  # z1 to the right, z2 upwards: the lower and the upper right corner


def test_the_colours_of_the_classes_stay_apart_on_black_also_for_colour_blind_eyes():
    """Machado et al. 2009 for eyes without red, green or blue cones; distance and lightness in Oklab, Ottosson 2020."""
    linear = (torch.tensor(quest.COLOURS) / 255) ** 2.2
    views = {
        "all cones": torch.eye(3),
        "protan": torch.tensor([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
        "deutan": torch.tensor([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
        "tritan": torch.tensor([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
    }
    to_lms = torch.tensor([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    to_lab = torch.tensor([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    for eyes, view in views.items():
        lab = ((linear @ view.T).clamp(0, 1) @ to_lms.T) ** (1 / 3) @ to_lab.T
        assert torch.pdist(lab).min() > 0.09, eyes
        assert lab[:, 0].min() > 0.5, eyes  # bright against black, whose lightness is 0


def test_the_mirror_shows_the_first_four_digits_of_each_class_above_their_reconstructions(model, held_out):
    x, targets = held_out
    pairs = quest.reconstructions(model, x, targets)
    assert pairs.shape == (40, 1, 56, 28)
    shown, mirrored = pairs.view(40, 2, 784).unbind(dim=1)
    for label, nth in itertools.product(range(10), range(4)):
        expected = x[[i for i, target in enumerate(targets[:200].tolist()) if target == label][nth]]
        assert torch.equal(shown[10 * nth + label], expected)
        torch.testing.assert_close(mirrored[10 * nth + label], model.decode(model.encode(expected[None])[0])[0])


def test_the_growth_shows_the_sample_s_dreams_before_training_and_after_each_epoch(gallery, model):
    folder, _ = gallery
    frames, milliseconds = [], []
    with Image.open(folder / "dreams" / "dream_growth.gif") as animation:
        for index in range(animation.n_frames):
            animation.seek(index)
            milliseconds.append(animation.info["duration"])
            frames.append(torch.tensor(list(animation.convert("L").tobytes())).view(242, 242))
    assert milliseconds == [500, 500, 3000]
    sample = levels(folder / "dreams" / "dream_sample.png")
    distances = [(frame - sample).abs().float().mean() for frame in frames]
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))  # the same points on every device
    assert (frames[0] - 255 * quest.make_grid(quest.dream(model, z))[0]).abs().max() <= 1
    assert distances[0] > 50 > distances[1] > 1 > distances[2]  # from grey noise to the sample itself
