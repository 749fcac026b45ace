"""The model and its loss, held to torch.distributions; the images."""

import dataclasses
import hashlib
import math

import pytest
import torch
from harness import MNIST, ROOT, expect_equal
from torch.distributions import Bernoulli, Normal, kl_divergence
from torchvision import datasets, transforms

import quest_12_1 as quest

PIXELS, SIDE = quest.PIXELS, quest.SIDE


# ---- The recipe ----------------------------------------------------------------------
def test_the_defaults_are_the_specification_s_recipe():
    recipe = {
        "dataset": "MNIST",
        "hidden": 400,
        "latent_dim": 2,
        "beta": 1,
        "epochs": 10,
        "batch_size": 128,
        "learning_rate": 1e-3,
        "seed": 0,
        "samples": 64,
    }

    defaults = dataclasses.asdict(quest.Settings())

    assert {name: defaults[name] for name in recipe} == recipe


def test_the_default_model_has_the_specification_s_parameters():
    parameters = sum(weight.numel() for weight in quest.VAE().parameters())

    assert parameters == 631_188


# ---- The model -----------------------------------------------------------------------
@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 5])
def test_forward_returns_reconstruction_mu_and_logvar(n, latent_dim):
    model = quest.VAE(hidden=30, latent_dim=latent_dim)

    recon_x, mu, logvar = model(torch.rand(n, PIXELS))

    assert recon_x.shape == (n, PIXELS)
    assert mu.shape == logvar.shape == (n, latent_dim)


def test_square_images_are_taken_as_flat_ones_are():
    model = quest.VAE()
    squares = torch.rand(5, 1, SIDE, SIDE)
    eps = torch.randn(5, quest.Settings.latent_dim)
    # The same images, with columns where rows were in memory.
    turned = squares.transpose(2, 3).contiguous().transpose(2, 3)

    flat = model(squares.view(5, PIXELS), eps)

    names = ("recon_x", "mu", "logvar")
    expected = dict(zip(names, flat, strict=True))
    for images in (squares, turned):
        expect_equal(dict(zip(names, model(images, eps), strict=True)), expected)
        mu, logvar = model.encode(images)
        expect_equal({"mu": mu, "logvar": logvar}, {"mu": flat[1], "logvar": flat[2]})


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_forward_encodes_draws_and_decodes_in_training_and_in_evaluation(training):
    model = quest.VAE().train(training)
    x = torch.rand(5, PIXELS)
    eps = torch.randn(5, quest.Settings.latent_dim)

    recon_x, mu, logvar = model(x, eps)

    z = mu + torch.exp(logvar / 2) * eps
    off = (recon_x - model.decode(z)).abs().max().item()
    assert off < 1e-5, f"{off:.2g} off what mu + exp(logvar / 2) * eps decodes to"


@pytest.mark.parametrize("far", [-30.0, 20.0])
def test_mu_and_logvar_are_whatever_the_network_puts_out(far):
    model = quest.VAE()
    with torch.no_grad():
        model.encoder_mu.bias.fill_(far)
        model.encoder_logvar.bias.fill_(far)

    mu, logvar = model.encode(torch.zeros(1, PIXELS))

    for name, output in (("mu", mu), ("logvar", logvar)):
        held_back = (output - far).abs().max().item()
        assert held_back < 5, f"{name} is {held_back:.1f} away from {far}"


def test_z_is_drawn_with_the_mean_and_the_variance_told():
    """The mean of n draws is within 6 of its standard deviations, std / sqrt(n); the
    variance within 6 times sqrt(2 / n) of itself: one seed in 100 million fails."""
    model, n = quest.VAE(), 40_000
    mu = torch.tensor([1.5, -3.0])
    variance = torch.tensor([0.04, 9.0])

    z = model.reparameterize(mu.expand(n, 2), variance.log().expand(n, 2))

    mean_off = (z.mean(dim=0) - mu).abs() / (variance / n).sqrt()
    variance_off = (z.var(dim=0) / variance - 1).abs() / math.sqrt(2 / n)
    for what, off in (("mean", mean_off), ("variance", variance_off)):
        assert off.max() < 6, f"the {what} is off by {off.tolist()} of its deviations"


def test_z_passes_the_gradient_back_to_mu_and_logvar():
    """Of mu + exp(logvar / 2) * eps these are 1 and (z - mu) / 2."""
    mu = torch.randn(5, 3, requires_grad=True)
    logvar = torch.randn(5, 3, requires_grad=True)

    z = quest.VAE().reparameterize(mu, logvar)
    by_mu, by_logvar = torch.autograd.grad(z.sum(), (mu, logvar))

    torch.testing.assert_close(by_mu, torch.ones(5, 3))
    torch.testing.assert_close(by_logvar, (z - mu).detach() / 2)


def test_pixels_are_in_0_to_1_however_far_z_is():
    far = torch.tensor([[-1e4], [-40.0], [0.0], [1e4]])

    pixels = quest.VAE().decode(far.expand(4, quest.Settings.latent_dim))

    least, greatest = pixels.min().item(), pixels.max().item()
    assert 0 <= least <= greatest <= 1, f"pixels from {least} to {greatest}"


# ---- The loss ------------------------------------------------------------------------
@pytest.mark.parametrize("latent_dim", [1, 2, 8])
@pytest.mark.parametrize("beta", [0, 1, 30])
def test_the_loss_is_that_of_torch_distributions(beta, latent_dim):
    """In value and in gradient, for pixels that are black, white and grey, and for
    codes near and far, as they are with a small beta."""
    of = {"dtype": torch.float64, "requires_grad": True}
    logits = torch.randn(50, PIXELS, **of)
    mu = torch.linspace(-40, 40, 50 * latent_dim, **of).view(50, latent_dim)
    logvar = torch.randn(50, latent_dim, **of)
    x = torch.rand(50, PIXELS, dtype=torch.float64)
    x[:25] = x[:25].round()

    terms = quest.loss_terms(torch.sigmoid(logits), x, mu, logvar, beta)

    pixels = Bernoulli(logits=logits, validate_args=False)
    bce = -pixels.log_prob(x).sum()
    q = Normal(mu, torch.exp(logvar / 2))
    kld = kl_divergence(q, Normal(0.0, 1.0)).sum()
    expected = bce + beta * kld
    inputs = (logits, mu, logvar)
    torch.testing.assert_close(terms, (expected, bce, kld))
    torch.testing.assert_close(
        torch.autograd.grad(terms[0], inputs), torch.autograd.grad(expected, inputs)
    )


def test_loss_function_is_the_first_of_loss_terms():
    recon_x, x = torch.rand(2, 5, PIXELS)
    mu, logvar = torch.randn(2, 5, 2)

    loss = quest.loss_function(recon_x, x.view(5, 1, SIDE, SIDE), mu, logvar, 7)

    terms = quest.loss_terms(recon_x, x, mu, logvar, 7)
    expect_equal({"loss": loss}, {"loss": terms[0]})


@pytest.mark.parametrize("probability", [0.5, 1e-3, 1e-6])
def test_a_pixel_costs_the_logarithm_of_its_probability_however_small(probability):
    """Black pixels and white ones."""
    zeros = torch.zeros(1, 2)
    expected = -math.log(probability)
    for name, pixel in (("black", 0.0), ("white", 1.0)):
        x = torch.full((1, PIXELS), pixel, dtype=torch.float64)
        recon_x = torch.full_like(x, abs(1 - pixel - probability))

        cost = quest.loss_function(recon_x, x, zeros, zeros).item() / PIXELS

        assert cost == pytest.approx(expected), (
            f"a {name} pixel costs {cost:.3f} nats, "
            f"-log {probability} is {expected:.3f}"
        )


def test_the_kld_is_0_where_z_says_nothing_about_x():
    recon_x, x = torch.rand(2, 5, PIXELS)
    zeros = torch.zeros(5, 2)

    kld = quest.loss_terms(recon_x, x, zeros, zeros)[2]

    assert kld == 0, f"the KLD is {kld}"


def test_the_loss_of_one_half_of_the_mean_image_and_of_a_copy(digits):
    """For MNIST these are 543, 206 and 46 nats per image, as the texts say."""

    def cost(images):
        zeros = torch.zeros(1, 2)
        return quest.loss_function(images, digits, zeros, zeros).item() / len(digits)

    half = torch.full_like(digits, 0.5)
    mean = digits.mean(dim=0).expand_as(digits)

    assert cost(half) == pytest.approx(PIXELS * math.log(2), rel=1e-5)
    assert round(cost(mean)) == 206
    assert round(cost(digits)) == 46


def test_the_loss_of_a_grey_image_is_the_average_over_its_drawings(digits):
    """A grey of 0.3 is white 3 times in 10. The bound is 6 standard errors."""
    n, x = 20_000, digits[:1]
    recon_x = 0.05 + 0.9 * torch.rand(1, PIXELS)
    zeros = torch.zeros(1, 2)
    drawings = torch.bernoulli(x.expand(n, PIXELS))
    # Of one drawing; a pixel drawn white in place of black costs log(r / (1 - r)) less.
    variance = (x * (1 - x) * torch.logit(recon_x) ** 2).sum()

    of_drawings = quest.loss_function(recon_x.expand(n, -1), drawings, zeros, zeros)
    of_grey = quest.loss_function(recon_x, x, zeros, zeros)

    off = (of_drawings / n - of_grey).abs() / (variance / n).sqrt()
    assert off < 6, f"the grey image's loss is {off:.1f} standard errors off"


# ---- The images ----------------------------------------------------------------------
def test_images_are_what_the_dataset_gives_one_by_one():
    """With ToTensor alone, which is taken at once, and with other transforms, even
    random ones."""
    resize = transforms.Resize(SIDE)
    turn = transforms.RandomRotation(10)
    to_tensor = transforms.ToTensor()
    chains = [[to_tensor], [resize, turn, to_tensor], [resize, to_tensor, turn]]
    for chain in chains:
        transform = chain[0] if len(chain) == 1 else transforms.Compose(chain)
        dataset = datasets.MNIST(ROOT / "data", train=False, transform=transform)
        dataset.data, dataset.targets = dataset.data[:50], dataset.targets[:50]

        torch.manual_seed(2)
        images = quest.images_on("cpu", dataset)
        torch.manual_seed(2)
        one_by_one = torch.stack([dataset[n][0].flatten() for n in range(50)])

        name = " then ".join(type(part).__name__ for part in chain)
        expect_equal({name: images}, {name: one_by_one})


def test_load_data_returns_the_training_and_the_held_out_digits():
    """Those of the clone, and offline: here no request leaves the machine."""
    train_dataset, test_dataset = quest.load_data(ROOT / "data")

    assert (len(train_dataset), len(test_dataset)) == (60_000, 10_000)
    image, label = test_dataset[0]
    assert image.shape == (1, SIDE, SIDE)
    assert label == 7


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_each_data_set_that_the_readme_offers_is_torchvision_s(
    tmp_path, few_digits, name
):
    """MNIST's files stand in for each, since they have the same names."""
    (tmp_path / name).symlink_to(few_digits / "MNIST")
    settings = quest.Settings(dataset=name)

    for dataset in quest.load_data(tmp_path, settings.dataset):
        assert isinstance(dataset, getattr(datasets, name))
        assert len(dataset) > 0


def test_the_digits_in_git_are_mnist_s():
    sums = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    found = {
        name: hashlib.md5((MNIST / name).read_bytes()).hexdigest() for name in sums
    }

    assert found == sums
