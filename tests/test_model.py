"""The VAE: its layers, its shapes, and the reparameterization that training rests on."""

import pytest
import torch

import quest_12_1 as quest


@pytest.fixture
def model():
    torch.manual_seed(0)
    return quest.VAE()


def test_the_model_has_the_recipe_s_layers_and_631188_parameters(model):
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {
        "fc1.weight": (400, 784),
        "fc1.bias": (400,),
        "fc21.weight": (2, 400),
        "fc21.bias": (2,),
        "fc22.weight": (2, 400),
        "fc22.bias": (2,),
        "fc3.weight": (400, 2),
        "fc3.bias": (400,),
        "fc4.weight": (784, 400),
        "fc4.bias": (784,),
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == 631_188


@pytest.mark.parametrize("shape", [(5, 784), (5, 1, 28, 28), (1, 784)])
def test_forward_takes_flat_or_square_digits_and_returns_reconstruction_mu_and_logvar(model, shape):
    recon_x, mu, logvar = model(torch.rand(shape))
    assert (recon_x.shape, mu.shape, logvar.shape) == ((shape[0], 784), (shape[0], 2), (shape[0], 2))


def test_flat_and_square_digits_are_the_same_to_forward(model):
    x = torch.rand(3, 1, 28, 28)
    torch.manual_seed(1)
    square = model(x)
    torch.manual_seed(1)
    flat = model(x.view(3, 784))
    assert all(torch.equal(a, b) for a, b in zip(square, flat, strict=True))


def test_mu_and_logvar_come_from_fc21_and_fc22_after_a_relu(model):
    x = torch.rand(4, 784)
    hidden = (x @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    mu, logvar = model.encode(x)
    torch.testing.assert_close(mu, hidden @ model.fc21.weight.T + model.fc21.bias)
    torch.testing.assert_close(logvar, hidden @ model.fc22.weight.T + model.fc22.bias)


def test_decode_returns_probabilities_even_far_out_in_the_plane(model):
    images = model.decode(torch.tensor([[0.0, 0.0], [1e4, -1e4], [-3.0, 40.0]]))
    assert images.shape == (3, 784)
    assert images.min() >= 0 and images.max() <= 1
    hidden = (model.fc3.bias).clamp(min=0)
    torch.testing.assert_close(images[0], 1 / (1 + torch.exp(-(hidden @ model.fc4.weight.T + model.fc4.bias))))


def test_reparameterize_draws_with_the_mean_and_the_spread_it_was_given(model):
    mu, logvar = torch.tensor([1.5, -2.0]).expand(200_000, 2), torch.tensor([0.5, -1.0]).expand(200_000, 2)
    z = model.reparameterize(mu, logvar)
    torch.testing.assert_close(z.mean(dim=0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(dim=0), torch.exp(logvar[0] / 2), atol=0.02, rtol=0)
    assert torch.corrcoef(z.T)[0, 1].abs() < 0.02


def test_reparameterize_is_exact_at_fixed_noise_and_passes_gradients_to_mu_and_logvar(model):
    mu, logvar = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    torch.manual_seed(3)
    z = model.reparameterize(mu, logvar)
    torch.manual_seed(3)
    eps = torch.randn(6, 2)
    torch.testing.assert_close(z, mu + torch.exp(logvar / 2) * eps, rtol=0, atol=0)
    z.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones(6, 2))
    torch.testing.assert_close(logvar.grad, (eps * torch.exp(logvar / 2) / 2).detach())


def test_a_generator_of_its_own_leaves_the_global_noise_alone(model):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    mu = torch.zeros(4, 2)
    first = model.reparameterize(mu, mu, torch.Generator().manual_seed(9))
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(first, model.reparameterize(mu, mu, torch.Generator().manual_seed(9)))
