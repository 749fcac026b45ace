"""Learning, held to the steps of a textbook; what it tells and what it refuses."""

import math

import pytest
import torch
from benchmark import PlainVAE, plain_step
from harness import draws, expect_close
from torch import nn
from torch.utils.data import DataLoader

import quest_12_1 as quest


@pytest.fixture
def few(digits):
    """300 digits to train on, 100 to measure on."""
    return digits[:300], digits[300:400]


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


# ---- The steps -----------------------------------------------------------------------
def test_learn_takes_the_textbook_s_steps(digits):
    """Weight by weight, and with its losses; the last batch of an epoch is smaller."""
    x, x_test = digits[:1000], digits[1000:1100]
    settings = quest.Settings(epochs=4, seed=7, batch_size=96, learning_rate=2e-3)

    model, _, losses = quest.learn(x, x_test, settings)

    torch.manual_seed(settings.seed)
    plain = PlainVAE(quest.PIXELS, settings.hidden, settings.latent_dim)
    untrained = weights_of(plain)
    optimizer = torch.optim.Adam(plain.parameters(), lr=settings.learning_rate)
    loader = DataLoader(x, batch_size=settings.batch_size, shuffle=True)
    expected = [
        sum(plain_step(plain, optimizer, batch) for batch in loader) / len(x)
        for _ in range(settings.epochs)
    ]

    told = [loss["train"] for loss in losses]
    for epoch, (loss, textbook) in enumerate(zip(told, expected, strict=True), start=1):
        assert loss == pytest.approx(textbook, rel=1e-5), (
            f"epoch {epoch}: {loss - textbook:+.4f} nats off the textbook's training loss"
        )
    expect_close(weights_of(model), weights_of(plain), atol=2e-4, rtol=1e-3)
    for name, weight in weights_of(model).items():
        assert (weight - untrained[name]).abs().max() > 0.01, f"{name} has not moved"


def test_the_average_of_an_epoch_weighs_images_and_not_batches():
    """Five images of loss 10, five of loss 20, and two of loss 90: 27.5 on average."""
    batches = [
        torch.full((5, 1), 10.0),
        torch.full((5, 1), 20.0),
        torch.full((2, 1), 90.0),
    ]

    assert quest.train_epoch(torch.sum, batches) == pytest.approx(27.5)


def test_a_step_returns_its_loss_and_lowers_it(digits):
    """From the same noise, a small step makes the same batch's loss smaller."""
    model, x = quest.VAE(), digits[:128]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    torch.manual_seed(5)
    before = quest.train_step(model, optimizer, x, 7)
    torch.manual_seed(5)
    after = quest.loss_function(*forward_and_x(model, x), 7)

    assert before.shape == ()
    assert after < before, f"the loss rose from {before} to {after}"


def forward_and_x(model, x):
    """What loss_function takes first: recon_x, x, mu, logvar."""
    recon_x, mu, logvar = model(x)
    return recon_x, x, mu, logvar


def test_beta_weighs_the_kld_in_training_and_in_what_is_told(few):
    klds = []
    for beta in (0.0, 1.0, 7.0):
        settings = quest.Settings(epochs=3, beta=beta, learning_rate=5e-3)
        loss = quest.learn(*few, settings)[2][-1]

        assert loss["held_out"] == pytest.approx(loss["bce"] + beta * loss["kld"])
        klds.append(loss["kld"])

    assert klds[0] > klds[1] > klds[2], (
        f"the KLD does not fall with beta: with 0, 1 and 7 it is {klds}"
    )


def test_a_notebook_can_learn_with_other_sizes(few):
    settings = quest.Settings(epochs=1, hidden=30, latent_dim=5, samples=3)

    model, dreams, _ = quest.learn(*few, settings)

    expected = quest.VAE(settings.hidden, settings.latent_dim)
    for name, weight in expected.named_parameters():
        got = model.get_parameter(name).shape
        assert got == weight.shape, (
            f"{name}: expected the shape {tuple(weight.shape)}, not {tuple(got)}"
        )
    mu, _ = model.encode(few[1])
    assert mu.shape == (len(few[1]), 5)
    assert [len(images) for images in dreams] == [3, 3]


def test_each_training_image_is_taken_once_an_epoch(few):
    """Of as many as MNIST has. In place of pixels an image holds its number."""
    count = 60_000
    numbers = torch.arange(count, dtype=torch.float32).view(count, 1)
    taken = []

    def noting_step(x):
        taken.append(x)
        return torch.tensor(0.0)

    def accelerate(step):
        step(few[0])  # of real images: a schedule may expect a step
        return noting_step

    quest.learn(numbers, few[1], quest.Settings(epochs=1), accelerate)

    times = torch.cat(taken).flatten().long().bincount(minlength=count)
    each_once = (times == 1).all()
    assert each_once, (
        f"{(times == 0).sum()} of {count} images were not taken, "
        f"{(times > 1).sum()} more than once"
    )


def test_accelerate_is_asked_once_an_epoch_and_its_step_is_taken(few):
    """Here it returns a step that tells another loss: 3 nats per image."""
    asked, taken = [], []

    def accelerate(step):
        asked.append(step)

        def other_step(x):
            taken.append(len(x))
            step(x)
            return torch.tensor(3.0 * len(x))

        return other_step

    settings = quest.Settings(epochs=3)
    losses = quest.learn(*few, settings, accelerate)[2]

    count = len(few[0])
    assert len(asked) == 3
    assert sum(taken) == 3 * count
    assert [loss["train"] for loss in losses] == pytest.approx([3.0] * 3)


# ---- What is told and dreamt ---------------------------------------------------------
def test_the_held_out_loss_is_that_of_the_model_returned(few, digits):
    """On as many digits as are held out."""
    settings = quest.Settings(epochs=1, seed=5, beta=3)
    x_test = digits

    model, _, losses = quest.learn(few[0], x_test, settings)

    _, eps = draws(settings, len(x_test))
    with torch.no_grad():
        mu, logvar = model.encode(x_test)
        recon_x = model.decode(mu + torch.exp(logvar / 2) * eps)
        terms = quest.loss_terms(recon_x, x_test, mu, logvar, settings.beta)
    for name, term in zip(("held_out", "bce", "kld"), terms, strict=True):
        told, expected = losses[-1][name], term.item() / len(x_test)
        assert told == pytest.approx(expected, rel=1e-5), (
            f"{name}: {told:.4f} is told; "
            f"on all {len(x_test)} images the model's is {expected:.4f}"
        )


def test_a_held_out_loss_that_rises_neither_ends_training_nor_chooses_a_model(few):
    """Negatives are held out, which a model that learns digits draws ever worse."""
    settings = quest.Settings(epochs=3)
    negatives = 1 - few[1]

    model, _, losses = quest.learn(few[0], negatives, settings)

    told = [loss["held_out"] for loss in losses]
    assert told == sorted(told), f"it does not rise: {told}"
    assert len(told) == settings.epochs, f"training ended after {len(told)} epochs"
    _, eps = draws(settings, len(negatives))
    last = quest.evaluate(model, negatives, eps, settings.beta)[0]
    assert last == pytest.approx(told[-1], rel=1e-5), (
        f"the model returned is not the last epoch's: its held-out loss is {last:.2f}, "
        f"those of the epochs were {told}"
    )


def test_the_dreams_of_all_epochs_come_from_the_same_points(few):
    """With a rate of next to nothing they stay as they were before training."""
    settings = quest.Settings(epochs=3, learning_rate=1e-12)

    first, *others = quest.learn(*few, settings)[1]

    for epoch, dreams in enumerate(others, start=1):
        off = (dreams - first).abs().max().item()
        assert off < 1e-5, (
            f"the dreams after epoch {epoch} are of other points: {off:.2f} off those "
            "before training, though the weights have hardly moved"
        )


def test_dreams_are_decoded_before_training_and_after_each_epoch(few):
    settings = quest.Settings(epochs=3, seed=5)

    model, dreams, _ = quest.learn(*few, settings)

    z, _ = draws(settings, 0)
    torch.manual_seed(settings.seed)
    untrained = quest.VAE(settings.hidden, settings.latent_dim)
    assert len(dreams) == settings.epochs + 1
    expect_close(
        {"dreams before training": dreams[0], "the last dreams": dreams[-1]},
        {
            "dreams before training": quest.dream(untrained, z),
            "the last dreams": quest.dream(model, z),
        },
    )


@pytest.mark.parametrize("seed", [0, 1], ids=["seed 0", "seed 1"])
def test_the_seed_decides_what_is_learned(few, seed):
    def learned(seed):
        model = quest.learn(*few, quest.Settings(epochs=1, seed=seed))[0]
        return weights_of(model)

    first = learned(seed)
    torch.manual_seed(99)  # what was drawn before does not matter
    again, other = learned(seed), learned(seed + 1)

    for name, weight in first.items():
        same = (again[name] == weight).all()
        assert same, f"{name} is another when the seed {seed} is set again"
        assert (other[name] != weight).any(), f"{name} does not depend on the seed"


# ---- The two modes, and memory -------------------------------------------------------
def test_a_dropout_drops_in_training_and_never_in_what_is_told(few, monkeypatch):
    """A user plants one into the decoder: half of the pixels become 0 in training."""

    modes = []

    class Dropping(quest.VAE):
        def decode(self, z):
            modes.append(self.training)
            return nn.functional.dropout(super().decode(z), 0.5, self.training) / 2

    monkeypatch.setattr(quest, "VAE", Dropping)
    settings = quest.Settings(epochs=2)

    model, dreams, losses = quest.learn(*few, settings)

    in_training = 2 * math.ceil(len(few[0]) / settings.batch_size)
    assert sum(modes) == in_training, "not every step was in training mode"
    z, eps = draws(settings, len(few[1]))
    model.eval()
    torch.testing.assert_close(dreams[-1], quest.dream(model, z))
    told = quest.evaluate(model, few[1], eps)
    assert losses[-1]["held_out"] == pytest.approx(told[0], rel=1e-5)


def test_nothing_keeps_the_record_from_which_gradients_are_computed(digits):
    """The record of one evaluation of 10,000 digits would be more than 79 MB."""
    model, eps = quest.VAE(), torch.zeros(100, quest.Settings.latent_dim)
    optimizer = torch.optim.Adam(model.parameters())
    kept = []
    recording = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None)

    with recording:
        quest.evaluate(model, digits[:100], eps)
        images = quest.dream(model, eps)

    assert kept == []
    assert not images.requires_grad
    assert not quest.train_step(model, optimizer, digits[:9]).requires_grad


# ---- A loss that is not finite -------------------------------------------------------
@pytest.mark.parametrize("rate", [1.0, 10.0, 1e3, 1e6, 1e10, 1e15, 1e20])
@pytest.mark.parametrize("beta", [0.0, 1.0, 30.0])
def test_a_rate_that_is_too_high_is_named_or_ends_in_finite_losses(few, beta, rate):
    """At 1e20 every network overflows: weights of two layers are multiplied, which is
    1e40, and single precision ends at 3.4e38. Below, a network may survive."""
    settings = quest.Settings(epochs=2, beta=beta, learning_rate=rate)

    try:
        losses = quest.learn(*few, settings)[2]
    except FloatingPointError as error:
        assert f"lower the learning rate, {rate}" in str(error)
    else:
        assert rate < 1e20, "an overflow was told as a success"
        assert all(math.isfinite(value) for loss in losses for value in loss.values())


def test_a_nan_in_any_weight_is_found(few, monkeypatch):
    """Even in the decoder alone, where the guard of the loss hides it."""
    take_step = quest.train_step
    count = len(list(quest.VAE().parameters()))
    for broken in range(count):

        def step(model, *arguments, broken=broken):
            loss = take_step(model, *arguments)
            with torch.no_grad():
                list(model.parameters())[broken].view(-1)[0] = math.nan
            return loss

        monkeypatch.setattr(quest, "train_step", step)
        with pytest.raises(FloatingPointError, match="lower the learning rate"):
            quest.learn(few[0][:100], few[1], quest.Settings(epochs=1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_training_loss_alone_that_is_not_finite_is_found(few, monkeypatch, value):
    def spoilt_epoch(step, _):
        step(few[0])
        return value

    monkeypatch.setattr(quest, "train_epoch", spoilt_epoch)

    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        quest.learn(*few, quest.Settings(epochs=1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_alone_that_is_not_finite_is_found(
    few, monkeypatch, capsys, value
):
    """Before the next epoch begins."""
    monkeypatch.setattr(quest, "evaluate", lambda *_: [value, value, 1.0])

    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        quest.learn(*few, quest.Settings(epochs=3))

    goes_on = "Epoch 2/" in capsys.readouterr().err
    assert not goes_on, f"training goes on after a held-out loss of {value}"


# ---- Settings ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value",
    [
        {"dataset": "Nothing"},
        {"hidden": 0},
        {"latent_dim": 0},
        {"epochs": 0},
        {"batch_size": 0},
        {"samples": 0},
        {"beta": -1.0},
        {"beta": math.nan},
        {"beta": math.inf},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_by_its_name(value):
    (name,) = value

    with pytest.raises(ValueError, match=name):
        quest.Settings(**value)


def test_settings_cannot_be_changed_in_silence():
    with pytest.raises(AttributeError):
        quest.Settings().beta = 30
