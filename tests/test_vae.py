"""The VAE: its layers and its loss, held to torch.distributions; learning, held to the textbook's steps."""

import math

import pytest
import torch
from benchmark import PlainVAE, plain_step
from harness import ROOT, draws
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
    assert all(0 <= bound <= 1 for bound in model.decode(torch.tensor([[1e4, -1e4], [-3.0, 40.0]])).aminmax())


def test_a_notebook_can_build_a_model_of_another_size_and_weigh_kld_otherwise(held_out):
    weights, usual = ([tuple(w.shape) for w in vae.parameters()] for vae in (quest.VAE(30, latent_dim=5), quest.VAE()))
    assert weights[::2] == [(30, 784), (5, 30), (5, 30), (30, 5), (784, 30)]
    assert sum(math.prod(shape) for shape in usual) == 631_188
    learned = []
    for beta in (0, 7):
        sizes = {"hidden": 300, "latent_dim": 5, "samples": 3}
        model, dreams, (loss,) = quest.learn(held_out[0][:300], held_out[0][300:400], 1, beta=beta, **sizes)
        assert loss["held_out"] == pytest.approx(loss["bce"] + beta * loss["kld"]) and loss["kld"] > 0.1
        learned.append(model.fc3.weight)
    assert learned[0].shape == (300, 5) and not torch.equal(*learned) and [len(images) for images in dreams] == [3, 3]


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


def test_the_loss_is_543_for_one_half_206_for_the_mean_image_46_for_a_copy_and_an_average_over_drawings(held_out):
    x, zeros = held_out[0], torch.zeros(1, 2)
    images = torch.full_like(x, 0.5), x.mean(dim=0).expand_as(x), x
    costs = [quest.loss_function(image, x, zeros, zeros).item() / 10_000 for image in images]
    assert [round(cost) for cost in costs] == [543, 206, 46] and costs[0] == pytest.approx(784 * math.log(2))
    x, recon_x = x[:1], torch.rand(1, 784)
    drawn = torch.bernoulli(x.expand(20_000, 784))  # a grey of 0.3 is white 3 times in 10: BCE is the average
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


def test_learn_takes_the_textbook_s_steps_and_returns_what_it_has_learned(held_out):
    x, x_test, seed, epochs = held_out[0][:1000], held_out[0][1000:1500], 7, 4
    model, dreams, losses = quest.learn(x, x_test, epochs, seed, batch_size=100, lr=2e-3)
    torch.manual_seed(seed)
    plain = PlainVAE()
    untrained = {name: weight.clone() for name, weight in plain.state_dict().items()}
    optimizer, loader = torch.optim.Adam(plain.parameters(), lr=2e-3), DataLoader(x, batch_size=100, shuffle=True)
    expected = [sum(plain_step(plain, optimizer, batch) for batch in loader) / 1000 for _ in range(epochs)]
    assert [loss["train"] for loss in losses] == pytest.approx(expected, rel=1e-5)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=2e-4, rtol=1e-3)
    assert (model.fc1.weight - untrained["fc1.weight"]).abs().max() > 0.01  # 32 steps of Adam went somewhere
    z, eps = draws(seed, 500)
    mu, logvar = model.encode(x_test)
    terms = quest.loss_terms(model.decode(mu + torch.exp(logvar / 2) * eps), x_test, mu, logvar)
    assert list(losses[-1].values())[1:] == pytest.approx([term.item() / 500 for term in terms], rel=1e-5)
    torch.testing.assert_close(dreams[-1], model.decode(z).view(64, 1, 28, 28))
    model.load_state_dict(untrained)
    torch.testing.assert_close(dreams[0], model.decode(z).view(64, 1, 28, 28))
    assert len(dreams) == epochs + 1
    shorter = quest.learn(x, x_test, epochs - 1, seed, batch_size=100, lr=2e-3)[1]
    assert all(map(torch.equal, dreams, shorter))  # each epoch's dreams come from the same z


def test_training_is_in_training_mode_and_keeps_no_record_of_what_it_computed(held_out, model):
    """As dropout and batch norm need it; the record of one evaluation alone would keep more than 79 MB."""
    modes, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.0)
    model.register_forward_hook(lambda *_: modes.append(model.training))
    quest.train_epoch(model, optimizer, held_out[0][:256].split(128))
    assert not quest.train_step(model, optimizer, held_out[0][:9]).requires_grad
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        quest.evaluate(model, held_out[0][:100], torch.zeros(100, 2))
        quest.dream(model, torch.zeros(1, 2))
    assert modes == [True, True, True, False] and kept == []
