"""The VAE: its layers and its loss, held to torch.distributions; learning, held to the textbook's steps."""

import math

import pytest
import torch
from harness import ROOT, draws, operations_of_a_step
from plain import PlainVAE, plain_step
from torch import optim
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils.data import DataLoader
from torchvision import transforms

import quest_12_1 as quest


@pytest.mark.parametrize("n", [1, 5])
def test_forward_takes_flat_or_square_digits_and_returns_reconstruction_mu_and_logvar(model, n):
    x, eps = torch.rand(n, 1, 28, 28), torch.randn(n, 2)
    in_another_order = x.transpose(2, 3).contiguous().transpose(2, 3)  # the same digits, otherwise laid out in memory
    flat, *others = (model(digits, eps) for digits in (x.view(n, 784), x, in_another_order))
    assert [tuple(part.shape) for part in flat] == [(n, 784), (n, 2), (n, 2)]
    assert all(torch.equal(*pair) for other in others for pair in zip(flat, other))
    far_out = model.decode(torch.tensor([[1e4, -1e4], [-3.0, 40.0]]))
    assert far_out.min() >= 0 and far_out.max() <= 1


def test_a_notebook_can_build_a_model_of_another_size_and_weigh_kld_otherwise():
    model, x = quest.VAE(hidden=30, latent_dim=5), torch.rand(4, 784)
    assert [tuple(weight.shape) for weight in model.parameters() if weight.dim() == 2] == [
        (30, 784), (5, 30), (5, 30), (30, 5), (784, 30)
    ]  # fmt: skip
    recon_x, mu, logvar = model(x)
    _, bce, kld = quest.loss_terms(recon_x, x, mu, logvar)
    torch.testing.assert_close(quest.loss_function(recon_x, x, mu, logvar, beta=7), bce + 7 * kld)
    assert sum(weight.numel() for weight in quest.VAE().parameters()) == 631_188
    learned = [quest.learn(torch.rand(300, 784), x, epochs=1, latent_dim=5, beta=beta) for beta in (0, 7)]
    assert [round(loss - bce - beta * kld, 3) for (_, _, ((_, loss, bce, kld),)), beta in zip(learned, (0, 7))] == [
        0,
        0,
    ]
    assert not torch.equal(learned[0][0].fc1.weight, learned[1][0].fc1.weight) and learned[0][0].fc3.in_features == 5


@pytest.mark.parametrize("beta", [0, 1, 30])
def test_the_loss_is_bce_and_beta_times_kld_in_value_and_gradient_as_torch_distributions_computes(beta):
    of = {"dtype": torch.float64, "requires_grad": True}
    inputs = logits, mu, logvar = torch.randn(50, 784, **of), torch.randn(50, 2, **of), torch.randn(50, 2, **of)
    x = torch.rand(50, 784, dtype=torch.float64)
    x[:25] = x[:25].round()  # black and white, where the others are grey
    recon_x = torch.sigmoid(3 * logits)
    loss, *parts = quest.loss_terms(recon_x, x, 3 * mu, logvar, beta)
    bce = -Bernoulli(logits=3 * logits, validate_args=False).log_prob(x).sum()
    kld = kl_divergence(Normal(3 * mu, torch.exp(logvar / 2)), Normal(torch.zeros(2), torch.ones(2))).sum()
    torch.testing.assert_close([loss, *parts], [bce + beta * kld, bce, kld])
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(bce + beta * kld, inputs))
    assert torch.equal(quest.loss_function(recon_x, x.view(-1, 1, 28, 28), 3 * mu, logvar, beta), loss)
    assert quest.loss_terms(recon_x, x, torch.zeros(50, 2), torch.zeros(50, 2))[2] == 0


def test_the_scale_of_the_loss_is_543_for_one_half_206_for_the_mean_image_and_46_for_a_perfect_copy(held_out):
    x, zeros = held_out[0], torch.zeros(1, 2)
    images = torch.full_like(x, 0.5), x.mean(dim=0).expand_as(x), x
    costs = [quest.loss_function(image, x, zeros, zeros).item() / 10_000 for image in images]
    assert [round(cost) for cost in costs] == [543, 206, 46] and costs[0] == pytest.approx(784 * math.log(2))


def test_the_bce_of_grey_pixels_is_its_average_over_black_and_white_drawings_of_them(held_out):
    x, recon_x, zeros = held_out[0][:1], torch.rand(1, 784), torch.zeros(1, 2)
    drawn = torch.bernoulli(x.expand(20_000, 784))  # a grey of 0.3 is white 3 times in 10
    average = quest.loss_function(recon_x.expand_as(drawn), drawn, zeros, zeros) / 20_000
    torch.testing.assert_close(average, quest.loss_function(recon_x, x, zeros, zeros), rtol=1e-3, atol=0)


def test_the_digits_are_what_the_dataset_gives_image_by_image_also_with_another_transform_than_totensor():
    turn, to_tensor = transforms.RandomRotation(10), transforms.ToTensor()
    for transform in (to_tensor, transforms.Compose([turn, to_tensor]), transforms.Compose([to_tensor, turn])):
        dataset = quest.DATASET(ROOT / "data", train=False, transform=transform)
        dataset.data, dataset.targets = dataset.data[:50], dataset.targets[:50]
        torch.manual_seed(2)
        x = quest.images_on("cpu", dataset)
        torch.manual_seed(2)
        assert torch.equal(x, torch.stack([dataset[index][0].view(784) for index in range(50)]))


def test_an_epoch_of_learn_visits_every_digit_once_in_469_batches_in_a_new_order_that_the_seed_decides(monkeypatch):
    """A digit is told by its first pixel. No step is taken."""
    seen = []

    def no_training(model, optimizer, train_loader, beta):
        seen.append([batch[:, 0] for batch in train_loader])
        return 0.0

    monkeypatch.setattr(quest, "train_epoch", no_training)
    x = (torch.arange(60_000) / 60_000)[:, None].expand(60_000, 784)
    for seed in (4, 4, 5):
        quest.learn(x, x[:1], epochs=2, seed=seed)
    assert [len(batch) for batch in seen[0]] == 468 * [128] + [96]
    first, second, again, _, other, _ = (torch.cat(epoch) for epoch in seen)
    assert torch.equal(first.sort().values, x[:, 0]) and torch.equal(first, again)
    assert all((first == order).float().mean() < 0.01 for order in (second, other, x[:, 0]))


def test_learn_takes_the_textbook_s_steps_and_returns_what_it_has_learned(held_out):
    x, x_test, seed, epochs = held_out[0][:1000], held_out[0][1000:1500], 7, 4
    model, dreams, losses = quest.learn(x, x_test, epochs, seed)
    torch.manual_seed(seed)
    plain = PlainVAE()
    untrained = {name: weight.clone() for name, weight in plain.state_dict().items()}
    optimizer, loader = optim.Adam(plain.parameters(), lr=1e-3), DataLoader(x, batch_size=128, shuffle=True)
    expected = [sum(plain_step(plain, optimizer, batch) for batch in loader) / 1000 for _ in range(epochs)]
    assert [train_loss for train_loss, *_ in losses] == pytest.approx(expected, rel=1e-5)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=2e-4, rtol=1e-3)
    assert (model.fc1.weight - untrained["fc1.weight"]).abs().max() > 0.01  # 32 steps of Adam went somewhere

    z, eps = draws(seed, 500)
    mu, logvar = model.encode(x_test)
    recon_x = model.decode(mu + torch.exp(logvar / 2) * eps)
    held_out_terms = [term.item() / 500 for term in quest.loss_terms(recon_x, x_test, mu, logvar)]
    assert losses[-1][1:] == pytest.approx(held_out_terms, rel=1e-5)
    torch.testing.assert_close(dreams[-1], model.decode(z).view(64, 1, 28, 28))
    model.load_state_dict(untrained)
    torch.testing.assert_close(dreams[0], model.decode(z).view(64, 1, 28, 28))
    assert len(dreams) == epochs + 1


def test_the_held_out_loss_is_the_average_of_the_loss_and_its_parts_and_leaves_training_s_noise_alone(model, held_out):
    x, eps, noise = held_out[0][:500], torch.randn(500, 2), torch.get_rng_state()
    loss, bce, kld = quest.evaluate(model, x, eps)
    assert torch.equal(torch.get_rng_state(), noise)
    mu, logvar = model.encode(x)
    expected = quest.loss_terms(model.decode(mu + torch.exp(logvar / 2) * eps), x, mu, logvar)
    assert (loss, bce, kld) == pytest.approx([term.item() / 500 for term in expected], rel=1e-5)


def test_a_training_step_computes_61_operations():
    """On a GPU the number of operations, not their arithmetic, is the time of a step. Adam without `fused` has more."""
    assert operations_of_a_step("cpu") == 61
