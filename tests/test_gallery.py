"""The gallery: pictures that show what they claim, the same for the same seed."""

import io
import json
import math

import pytest
import torch
from PIL import Image

import quest_12_1 as quest

NAMES = ["dream_sample", "dream_canvas", "dream_mirror", "dream_atlas", "dream_history"]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, unpacked, nurseries):
    """A gallery run of two epochs, so that the history has a line to draw; returns (folder, its result)."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "data").symlink_to(unpacked / "data")
    result = nurseries[0].run(folder, "--gallery", "--json", "--epochs", "2")
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return quest.VAE()


def picture(data):
    return Image.open(io.BytesIO(data))


def test_the_gallery_saves_five_whole_pictures_and_names_each_in_the_message(gallery):
    folder, answer = gallery
    files = [f"dreams/{name}.png" for name in NAMES]
    assert answer["files"] == files and all(name in answer["message"] for name in files)
    sizes = {}
    for name, file in zip(NAMES, files, strict=True):
        with Image.open(folder / file) as image:
            image.load()
            sizes[name] = image.size
    assert sizes == dict(zip(NAMES, [(242, 242), (602, 602), (324, 244), (900, 900), (900, 900)], strict=True))
    assert {path.name for path in (folder / "dreams").iterdir()} == {f"{name}.png" for name in NAMES} | {".lock"}


def test_the_gallery_is_the_same_bytes_again_and_its_sample_is_the_plain_run_s(gallery, folder, nursery):
    first, _ = gallery
    assert nursery.run(folder, "--epochs", "2").returncode == 0
    plain = (folder / "dreams" / "dream_sample.png").read_bytes()
    assert [path.name for path in (folder / "dreams").glob("*.png")] == ["dream_sample.png"]
    assert plain == (first / "dreams" / "dream_sample.png").read_bytes()
    assert nursery.run(folder, "--epochs", "2", "--gallery").returncode == 0
    for name in NAMES:
        assert (folder / "dreams" / f"{name}.png").read_bytes() == (first / "dreams" / f"{name}.png").read_bytes()


def test_a_cell_of_the_canvas_is_decode_of_the_quantiles_it_stands_for(model):
    pixels = torch.tensor(list(picture(quest.draw_canvas(model, torch.device("cpu"))).tobytes())).view(602, 602)
    normal = torch.distributions.Normal(0, 1)
    for row, column in ((0, 0), (0, 19), (7, 12), (19, 0)):
        z1 = normal.icdf(torch.tensor((column + 0.5) / 20))
        z2 = normal.icdf(torch.tensor((19 - row + 0.5) / 20))  # upwards, as in the atlas
        cell = pixels[2 + 30 * row : 30 + 30 * row, 2 + 30 * column : 30 + 30 * column]
        expected = model.decode(torch.stack((z1, z2))[None]).view(28, 28) * 255
        assert (cell - expected).abs().max() <= 0.51
    assert len(torch.unique(quest.canvas_points(), dim=0)) == 400


def test_the_mirror_shows_four_digits_of_each_class_above_their_reconstructions(model, mnist):
    test_dataset = mnist[1]
    chosen = quest.mirror_indices(test_dataset.targets)
    assert test_dataset.targets[chosen].tolist() == list(range(10)) * 4 and len(set(chosen.tolist())) == 40
    x = quest.pixels_of(test_dataset, torch.device("cpu"))[chosen]
    pixels = torch.tensor(list(picture(quest.draw_mirror(model, x)).tobytes())).view(244, 324)
    for pair in (0, 9, 10, 39):
        top, left = 4 + 60 * (pair // 10), 4 + 32 * (pair % 10)
        shown, mirrored = pixels[top : top + 56, left : left + 28].split(28)
        assert torch.equal(shown.flatten(), (x[pair] * 255).round().to(shown.dtype))
        assert (mirrored.flatten() - model.decode(model.encode(x[pair : pair + 1])[0]) * 255).abs().max() <= 0.51


def test_every_point_of_the_atlas_stands_within_its_frame(model, mnist, monkeypatch):
    test_dataset = mnist[1]
    x = quest.pixels_of(test_dataset, torch.device("cpu"))
    dots = []
    monkeypatch.setattr(quest.Chart, "dot", lambda self, centre, radius, colour: dots.append((*centre, colour)))
    with torch.no_grad():
        model.fc21.weight *= 30  # an atlas with far outliers
    quest.draw_atlas(model, x, test_dataset.targets)
    points = dots[:10_000]
    assert all(70 <= across <= 876 and 96 <= down <= 850 for across, down, _ in points)
    mu = model.encode(x)[0]
    right, lowest = mu[:, 0].argmax(), mu[:, 1].argmin()  # z1 to the right, z2 upwards
    assert points[right][0] == max(across for across, _, _ in points)
    assert points[lowest][1] == max(down for _, down, _ in points)
    assert [colour for *_, colour in points[:3]] == [quest.CLASS_COLOURS[label] for label in test_dataset.targets[:3]]
    assert len(set(quest.CLASS_COLOURS)) == 10
    legend = [(across, colour) for across, down, colour in dots[10_000:] if down < 96 and colour != quest.PAPER]
    assert [colour for _, colour in sorted(legend)] == list(quest.CLASS_COLOURS)


def test_the_atlas_names_each_class_where_it_is_dense_and_in_the_lead():
    torch.manual_seed(0)
    centres = torch.tensor([[4 * math.cos(k), 4 * math.sin(k)] for k in range(10)])
    targets = torch.arange(10).repeat(100)
    mu = centres[targets] + 0.1 * torch.randn(1000, 2)
    assert (quest.strongholds(mu, targets) - centres).norm(dim=1).max() < 0.5
    mu[targets == 9] = torch.cat((mu[targets == 8][:60] + 0.01, mu[targets == 9][:40]))  # most of 9 hides among 8
    names = quest.strongholds(mu, targets)
    assert (names[8] - centres[8]).norm() < 0.5 and (names[9] - centres[9]).norm() < 0.5


def test_the_history_ends_at_the_numbers_that_the_result_reports(monkeypatch):
    texts = []
    monkeypatch.setattr(quest.Chart, "text", lambda self, position, text, **_: texts.append(text))
    history = [(quest.Loss(180, 5), quest.Loss(165, 5.5)), (quest.Loss(150.25, 5.75), quest.Loss(148.5, 6.125))]
    assert picture(quest.draw_history(history)).size == (900, 900)
    for expected in ("training 156.00", "held-out 154.62", "training 150.25", "held-out 148.50", "held-out 6.12"):
        assert expected in texts


def test_a_history_of_one_epoch_can_be_drawn():
    assert picture(quest.draw_history([(quest.Loss(180, 5), quest.Loss(165, 5))])).size == (900, 900)


@pytest.mark.parametrize(("low", "high"), [(150.2, 191.3), (-4.56, 4.56), (5.0, 5.0), (0, 10), (-1e-9, 1e-9), (3, 3e5)])
def test_ticks_are_a_few_equal_steps_that_enclose_the_values(low, high):
    marks = quest.ticks(low, high)
    assert marks[0] <= low and high <= marks[-1] and 2 <= len(marks) <= 13
    steps = {round(b - a, 9) for a, b in zip(marks, marks[1:], strict=False)}
    assert len(steps) == 1
