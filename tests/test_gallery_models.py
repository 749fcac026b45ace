"""Which models the gallery can draw, how far, and what it says of the others."""

import dataclasses
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import faults
import pytest
import torch
from harness import (
    PICTURES,
    data_of,
    expect_no_black_picture,
    expect_old_or_new,
    expect_one_message,
    expect_same_files,
    expect_signal,
    expect_success,
    files_in,
    levels,
    read_idx,
    run_gallery,
    write_data,
)
from PIL import ImageDraw

import quest_12_1 as quest
from dreams import gallery

EARLIER = b"an earlier picture"


def save_model(folder, **changes):
    """Save a model of a run that has not learned; return what was saved."""
    settings = quest.Settings(**{"epochs": 2, "latent_dim": 2} | changes)
    model = quest.VAE(settings.hidden, settings.latent_dim)
    z = torch.randn(settings.samples, settings.latent_dim)
    loss = {"train": 500.0, "held_out": 490.0, "bce": 480.0, "kld": 10.0}
    saved = {
        "settings": dataclasses.asdict(settings),
        "model": model.state_dict(),
        "losses": [loss] * settings.epochs,
        # Before training and after each epoch.
        "dreams": [quest.dream(model, z)] * (settings.epochs + 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(saved, folder / "dream_model.pt")
    return saved


@pytest.fixture
def earlier_dreams(folder):
    """The folder dreams/ of a clone, with a model and all five pictures of an earlier
    one."""
    save_model(folder / "dreams")
    for name in PICTURES:
        (folder / "dreams" / name).write_bytes(EARLIER)
    return folder / "dreams"


@pytest.fixture
def no_page(earlier_dreams):
    """Why the page does not compute the script's network; None if it does."""
    return gallery.why_no_page(gallery.Run("dreams"))


@pytest.fixture
def a_page(no_page):
    """For tests of the page, which are skipped if the page cannot show the script's
    network. test_the_gallery_makes_five_files_and_names_each fails then."""
    if no_page:
        pytest.skip(no_page)


@pytest.fixture
def pictures(no_page):
    """The files that the gallery makes of a model of this network with a plane."""
    return [name for name in PICTURES if not (no_page and name.endswith("html"))]


@pytest.fixture
def texts(monkeypatch):
    """All that is written into pictures, in a list."""
    written = []
    write = ImageDraw.ImageDraw.text

    def noting(self, place, text, *arguments, **named):
        written.append(text)
        return write(self, place, text, *arguments, **named)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noting)
    return written


@pytest.fixture
def refused(earlier_dreams, call):
    """A function: run the gallery, expect one message and everything as it was.

    A test that uses it asks for `earlier_dreams` only to change what is there.
    """

    def expect_refusal(*parts, arguments=()):
        before = files_in(earlier_dreams)
        result = call(gallery.main, *arguments)
        message = expect_one_message(result, *parts, program="dreams.gallery")
        assert result.stdout == ""
        expect_same_files(earlier_dreams, before)
        return message

    return expect_refusal


def shown_in(folder):
    """The data of the page in `folder`: a dict."""
    return data_of((folder / "dream_plane.html").read_text(encoding="utf-8"))


# ---- What a model allows -------------------------------------------------------------
def test_a_new_model_s_pictures_replace_the_earlier_ones(
    earlier_dreams, call, pictures
):
    result = call(gallery.main)

    expect_success(result)
    for name in pictures:
        data = (earlier_dreams / name).read_bytes()
        assert data != EARLIER, f"{name} is the earlier one"
        assert f"dreams/{name}" in result.stdout


@pytest.mark.parametrize("latent_dim", [1, 8])
def test_without_a_plane_there_are_growth_and_mirror(earlier_dreams, call, latent_dim):
    """An earlier model's plane is removed, and the message says why there is none."""
    save_model(earlier_dreams, latent_dim=latent_dim)

    result = call(gallery.main)

    expect_success(result)
    there = [name for name in PICTURES if (earlier_dreams / name).exists()]
    assert there == ["dream_growth.gif", "dream_mirror.png"]
    told = [name for name in PICTURES if name in result.stdout]
    assert told == there, "the message names other pictures than there are"
    assert f"this model has {latent_dim}" in result.stdout
    expect_no_black_picture(earlier_dreams / "dream_mirror.png")


def with_the_last_dream_alone(saved):
    """It is white, the others are black."""
    for dreams in saved["dreams"]:
        dreams[:-1] = 0
        dreams[-1] = 1


@pytest.mark.parametrize("samples", [10, 80])
def test_another_number_of_dreams_and_epochs_is_drawn(earlier_dreams, call, samples):
    """To the last dream of the last epoch."""
    save_model(earlier_dreams, samples=samples, epochs=4, hidden=30)
    resave(earlier_dreams, with_the_last_dream_alone)

    expect_success(call(gallery.main))

    frame = levels(earlier_dreams / "dream_growth.gif", frame=4)[gallery.STRIP :]
    brightest = frame.max().item()
    assert brightest > 200, f"the last of {samples} dreams is not in the growth"


def test_another_data_set_is_told_by_its_name(earlier_dreams, fashion, call, texts):
    save_model(earlier_dreams, dataset="FashionMNIST")

    result = call(gallery.main)

    expect_success(result)
    assert texts
    for text in texts:
        assert "FashionMNIST" in text
        assert not re.search(r"\bMNIST\b|digit", text)
    assert not re.search(r"\bMNIST\b", result.stdout)


def test_another_data_set_reaches_the_page(earlier_dreams, call, a_page, fashion):
    save_model(earlier_dreams, dataset="FashionMNIST")

    expect_success(call(gallery.main))

    shown = shown_in(earlier_dreams)
    assert shown["dataset"] == "FashionMNIST"
    assert shown["classes"][:2] == ["T-shirt/top", "Trouser"]


@pytest.mark.parametrize("beta", ["1", "0.05"])
def test_pictures_tell_which_run_they_are_of(earlier_dreams, call, texts, beta):
    save_model(earlier_dreams, beta=float(beta), epochs=3, seed=11)

    expect_success(call(gallery.main))

    titles = [text for text in texts if re.search(rf"\bbeta {beta}(?![\d.])", text)]
    assert len(titles) == 3, f"mirror, canvas and codes say {texts}"
    for title in titles:
        for part in ("MNIST", "3 epochs", "seed 11"):
            assert re.search(rf"\b{part}\b", title), f"no {part!r} in {title!r}"


def test_each_frame_of_the_growth_tells_its_epoch(earlier_dreams, call, texts):
    epochs = gallery.Run("dreams").settings.epochs

    expect_success(call(gallery.main))

    of_growth = [text for text in texts if "training" in text or "after" in text]
    assert of_growth == [
        "MNIST: before training",
        *(f"MNIST: after epoch {epoch}" for epoch in range(1, epochs + 1)),
    ]


def test_canvas_and_codes_tell_how_far_their_plane_goes(earlier_dreams, texts):
    run = gallery.Run("dreams")
    run.mu += 6  # beyond gallery.LEAST_EXTENT, so the plane has to be wider

    gallery.draw_canvas(run)
    gallery.draw_codes(run)

    half = run.extent
    assert half > gallery.LEAST_EXTENT, "the plane is as wide as ever"
    assert len(texts) == 2
    for title in texts:
        told = title.endswith(f"from -{half} to {half}")
        assert told, f"the plane goes to {half}, the title is {title!r}"


def test_an_earlier_picture_is_removed_only_when_the_new_ones_are_saved(
    earlier_dreams, call, monkeypatch
):
    save_model(earlier_dreams, latent_dim=8)
    before = files_in(earlier_dreams)

    def refuse(*_):
        raise quest.JobError("a full disk")

    monkeypatch.setattr(quest, "save_files", refuse)

    expect_one_message(call(gallery.main), "a full disk", program="dreams.gallery")

    expect_same_files(earlier_dreams, before)


class Malicious:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("it ran"),)


def test_a_file_that_would_run_code_is_refused(earlier_dreams, refused):
    torch.save({"settings": Malicious()}, "dreams/dream_model.pt")

    refused("dream_model.pt cannot be read")

    assert not Path("it ran").exists()


def test_a_model_in_a_folder_elsewhere_is_drawn_there(
    earlier_dreams, tmp_path_factory, call, pictures
):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "run 7"
    save_model(elsewhere)
    before = files_in(earlier_dreams)

    expect_success(call(gallery.main, str(elsewhere)))

    assert sorted(files_in(elsewhere)) == sorted([*pictures, "dream_model.pt"])
    expect_same_files(earlier_dreams, before)


# ---- Models that it cannot use -------------------------------------------------------
def test_no_model_is_one_message(earlier_dreams, refused):
    (earlier_dreams / "dream_model.pt").unlink()

    refused("dreams/dream_model.pt", "python quest_12_1.py")


def test_no_folder_is_one_message(refused):
    refused("nowhere/dream_model.pt", arguments=["nowhere"])


@pytest.mark.parametrize("left", [0, 1e-6, 1e-4, 0.5, 1 - 1e-6])
def test_a_model_cut_short_anywhere_is_one_message(earlier_dreams, refused, left):
    """Of its millions of bytes this share is left."""
    data = (earlier_dreams / "dream_model.pt").read_bytes()
    (earlier_dreams / "dream_model.pt").write_bytes(data[: int(left * len(data))])

    refused("dreams/dream_model.pt")


@pytest.mark.parametrize("data", [b"nonsense", b"PK\3\4", b"\x89PNG\r\n"])
def test_a_file_that_is_no_model_is_one_message(earlier_dreams, refused, data):
    (earlier_dreams / "dream_model.pt").write_bytes(data)

    refused("dreams/dream_model.pt")


@pytest.mark.parametrize(
    "saved",
    [
        quest.VAE().state_dict(),  # what earlier versions saved
        [1, 2],
        torch.zeros(3),
        {"settings": {}},
        {"settings": None, "model": {}, "losses": [], "dreams": []},
    ],
    ids=["weights alone", "a list", "a tensor", "settings alone", "no settings"],
)
def test_another_version_s_file_is_one_message(earlier_dreams, refused, saved):
    torch.save(saved, earlier_dreams / "dream_model.pt")

    refused("dreams/dream_model.pt")


def resave(folder, change):
    """Change what dream_model.pt holds by change(saved)."""
    saved = torch.load(folder / "dream_model.pt")
    change(saved)
    torch.save(saved, folder / "dream_model.pt")


def with_a_new_setting(saved):
    saved["settings"]["dropout"] = 0.5


def with_a_setting_out_of_range(saved):
    saved["settings"]["dataset"] = "Nothing"


def with_another_size(saved):
    saved["settings"]["hidden"] += 1


def with_another_layer(saved):
    saved["model"]["encoder_second.weight"] = torch.zeros(3, 3)


def with_a_layer_less(saved):
    del saved["model"][next(iter(saved["model"]))]


@pytest.mark.parametrize(
    "change",
    [
        with_a_new_setting,
        with_a_setting_out_of_range,
        with_another_size,
        with_another_layer,
        with_a_layer_less,
    ],
)
def test_a_model_that_does_not_fit_the_script_is_one_message(
    earlier_dreams, refused, change
):
    resave(earlier_dreams, change)

    refused("dreams/dream_model.pt")


def test_a_network_that_the_page_does_not_compute_has_no_page(
    earlier_dreams, call, monkeypatch
):
    """Another layer in the decoder, in script and model: all pictures but the page."""

    class Deeper(quest.VAE):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.decoder_second = torch.nn.Linear(quest.PIXELS, quest.PIXELS)

        def decode(self, z):
            return torch.sigmoid(self.decoder_second(super().decode(z)))

    monkeypatch.setattr(quest, "VAE", Deeper)
    save_model(earlier_dreams)

    result = call(gallery.main)

    expect_success(result)
    assert not (earlier_dreams / "dream_plane.html").exists(), (
        "the earlier page is still there"
    )
    assert "No page" in result.stdout
    expect_no_black_picture(earlier_dreams / "dream_canvas.png")


# ---- Data and templates that it cannot use -------------------------------------------
def leave_of_class(raw, label, count):
    """Leave `count` images of a class in the data."""
    images = read_idx(raw / "t10k-images-idx3-ubyte")
    labels = read_idx(raw / "t10k-labels-idx1-ubyte")
    of_class = (labels == label).nonzero().flatten()
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[of_class[count:]] = False
    shutil.rmtree(raw)
    write_data(raw, images[keep], labels[keep])


@pytest.mark.parametrize("count", [0, 3])
def test_a_class_of_few_images_is_one_message(own_data, refused, count):
    leave_of_class(own_data, 7, count)

    refused(f"{count} held-out images of class 7")


def test_a_class_of_fewer_images_than_the_page_shows_is_one_message(
    own_data, refused, a_page
):
    count = gallery.EACH - 1
    leave_of_class(own_data, 7, count)

    refused(f"{count} held-out images of class 7")


def test_images_of_another_size_are_one_message(own_data, refused):
    shutil.rmtree(own_data)
    side = quest.SIDE + 4
    images = torch.randint(256, (1000, side, side), dtype=torch.uint8)
    write_data(own_data, images, torch.arange(1000).remainder(10).byte())

    refused(f"{side * side} pixels")


def test_data_that_are_missing_are_one_message(own_data, refused):
    shutil.rmtree(own_data)

    refused("neither read nor downloaded", "git checkout")


@pytest.fixture
def template(tmp_path_factory, monkeypatch):
    """A template that a test may change."""
    path = tmp_path_factory.mktemp("template") / "plane.html"
    shutil.copy(gallery.TEMPLATE, path)
    monkeypatch.setattr(gallery, "TEMPLATE", path)
    return path


def test_a_template_that_is_changed_is_one_message(template, refused, a_page):
    template.write_text(template.read_text().replace('id="run"', 'id="runs"'))

    refused("plane.html")


def test_a_template_that_is_missing_is_one_message(template, refused, a_page):
    template.unlink()

    refused("plane.html")


@pytest.mark.skipif(sys.flags.utf8_mode, reason="-X utf8: every text is UTF-8")
def test_the_template_is_read_as_utf_8_in_any_locale(earlier_dreams, folder, a_page):
    with open(folder / "dreams" / "plane.html", "a", encoding="utf-8") as template:
        template.write("<!-- μ → z -->")

    result = run_gallery(folder, fault=faults.ascii_by_default)

    expect_success(result)
    page = (earlier_dreams / "dream_plane.html").read_bytes()
    read_whole = page.endswith("<!-- μ → z -->".encode())
    assert read_whole, f"the page ends with {page[-30:]}"


def test_without_a_page_no_template_is_needed(template, earlier_dreams, call):
    template.unlink()
    save_model(earlier_dreams, latent_dim=8)

    expect_success(call(gallery.main))


# ---- Two models beside each other ----------------------------------------------------
def test_beside_puts_two_models_into_one_page(earlier_dreams, folder, call, a_page):
    first = save_model(earlier_dreams, beta=1.0)
    second = save_model(folder / "b0", beta=0.0, hidden=30)
    for name in PICTURES:
        (folder / "b0" / name).write_bytes(EARLIER)
    before = files_in(folder / "b0")

    expect_success(call(gallery.main, "--beside", "b0"))

    one, two = shown_in(earlier_dreams)["models"]
    assert one["settings"] == first["settings"]
    assert two["settings"] == second["settings"]
    differ = one["tensors"] != two["tensors"]
    assert differ, "the page's two models have the same weights"
    expect_same_files(folder / "b0", before)


def test_beside_leaves_the_pictures_those_of_the_first_model(
    earlier_dreams, folder, call, a_page
):
    expect_success(call(gallery.main))
    alone = files_in(earlier_dreams)
    save_model(folder / "b0", beta=0.0, hidden=30)

    expect_success(call(gallery.main, "--beside", "b0"))

    now = files_in(earlier_dreams)
    changed = [name for name in now if now[name] != alone[name]]
    assert changed == ["dream_plane.html"], "expected the page alone to be another"


def test_without_beside_the_page_holds_one_model(earlier_dreams, call, a_page):
    expect_success(call(gallery.main))

    count = len(shown_in(earlier_dreams)["models"])
    assert count == 1, f"the page holds {count} models"


def test_beside_a_model_without_a_plane_is_one_message(folder, refused, a_page):
    save_model(folder / "other", latent_dim=8)

    refused("--beside", "this model has 8", arguments=["--beside", "other"])


def test_beside_a_model_of_another_data_set_is_one_message(
    folder, own_data, refused, a_page
):
    (own_data.parents[1] / "FashionMNIST").symlink_to("MNIST")
    save_model(folder / "other", dataset="FashionMNIST")

    refused("--beside", "different data sets", arguments=["--beside", "other"])


def test_beside_a_first_model_without_a_plane_is_one_message(
    earlier_dreams, folder, refused
):
    save_model(earlier_dreams, latent_dim=8)
    save_model(folder / "other")

    refused("--beside", "has 8", arguments=["--beside", "other"])


def test_beside_a_folder_without_a_model_is_one_message(refused):
    refused("nowhere/dream_model.pt", arguments=["--beside", "nowhere"])


# ---- The process ---------------------------------------------------------------------
def test_a_wrong_command_line_exits_with_2_usage_and_reason(earlier_dreams, call):
    result = call(gallery.main, "--nonsense")

    assert result.returncode == 2
    assert "usage: python -m dreams.gallery" in result.stderr
    assert "--nonsense" in result.stderr


def test_help_tells_of_the_folder_and_of_beside(call):
    result = call(gallery.main, "--help")

    assert result.returncode == 0
    assert "--beside FOLDER" in result.stdout
    assert "(default: dreams)" in result.stdout


def test_a_full_disk_is_one_message_and_keeps_the_earlier_pictures(
    earlier_dreams, folder, pictures
):
    """Full at the last byte of the largest file, the page or a picture."""
    before = files_in(earlier_dreams)
    expect_success(run_gallery(folder))
    largest = max((earlier_dreams / name).stat().st_size for name in pictures)
    for name in PICTURES:
        (earlier_dreams / name).write_bytes(EARLIER)

    full = partial(faults.no_room_beyond, largest - 1)
    result = run_gallery(folder, fault=full)

    expect_one_message(result, "cannot save", program="dreams.gallery")
    expect_same_files(earlier_dreams, before)


@pytest.mark.parametrize(
    ("kill", "moved", "missed"),
    [
        (faults.killed_in_writing, 0, "no large file was written"),
        (partial(faults.killed_at_move, 3), 2, "no third file was moved into place"),
    ],
    ids=["while it writes", "between the moves"],
)
def test_a_killed_gallery_leaves_whole_pictures_and_the_next_one_draws_all(
    earlier_dreams, folder, call, pictures, kill, moved, missed
):
    before = files_in(folder)

    result = run_gallery(folder, fault=kill)

    expect_signal(result, signal.SIGKILL, missed)
    killed = files_in(folder)
    expect_success(call(gallery.main))
    drawn = files_in(folder)
    expect_old_or_new(killed, before, before | drawn, moved)
    for name in pictures:
        is_new = drawn[f"dreams/{name}"] != EARLIER
        assert is_new, f"{name} is still the earlier one after the next run"


def test_ctrl_c_is_one_line_and_keeps_the_earlier_pictures(earlier_dreams, folder):
    before = files_in(earlier_dreams)

    result = run_gallery(folder, fault=faults.ctrl_c_in_saving)

    expect_signal(result, signal.SIGINT)
    assert result.stderr == "dreams.gallery: stopped by Ctrl-C.\n"
    expect_same_files(earlier_dreams, before)
