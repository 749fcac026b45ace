"""The loss: held to torch.distributions and to PyTorch's own cross-entropy, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Normal, kl_divergence

import quest_12_1 as quest


@pytest.fixture(autouse=True)
def fixed_noise():
    torch.manual_seed(0)


def prior(n, dtype=torch.float32):
    return torch.zeros(n, 2, dtype=dtype), torch.zeros(n, 2, dtype=dtype)


def test_the_kld_is_the_divergence_that_torch_distributions_computes():
    mu, logvar = 3 * torch.randn(50, 2, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    q, p = Normal(mu, torch.exp(logvar / 2)), Normal(torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(quest.kl_divergence(mu, logvar), kl_divergence(q, p).sum())


def test_the_kld_is_zero_at_the_prior_and_positive_elsewhere():
    assert quest.kl_divergence(*prior(7)) == 0
    assert quest.kl_divergence(torch.tensor([[0.1, 0.0]]), torch.zeros(1, 2)) > 0
    assert quest.kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, -0.1]])) > 0


def test_the_bce_is_minus_the_log_likelihood_that_torch_distributions_computes():
    recon_x = torch.rand(20, 784, dtype=torch.float64) * 0.98 + 0.01
    x = torch.bernoulli(torch.rand(20, 784, dtype=torch.float64))
    loss = quest.loss_function(recon_x, x, *prior(20, torch.float64))
    torch.testing.assert_close(loss, -Bernoulli(recon_x).log_prob(x).sum())


def test_the_loss_is_pytorch_s_summed_cross_entropy_plus_the_kld_in_value_and_gradient():
    logits = 8 * torch.randn(128, 784)
    x = torch.rand(128, 784)
    mu, logvar = torch.randn(128, 2), torch.randn(128, 2)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = quest.loss_function(torch.sigmoid(ours), x, mu, logvar)
    expected = F.binary_cross_entropy(torch.sigmoid(theirs), x, reduction="sum") + quest.kl_divergence(mu, logvar)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_loss_pass_gradcheck_in_float64():
    recon_x = (torch.rand(3, 784, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    mu, logvar = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.rand(3, 784, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda recon_x, mu, logvar: quest.loss_function(recon_x, x, mu, logvar), (recon_x, mu, logvar), fast_mode=True
    )


def test_the_loss_takes_square_digits_as_well_as_flat_ones():
    recon_x, x = torch.rand(4, 784), torch.rand(4, 1, 28, 28)
    assert torch.equal(
        quest.loss_function(recon_x, x, *prior(4)), quest.loss_function(recon_x, x.view(4, 784), *prior(4))
    )


@pytest.mark.parametrize("pixel", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("logit", [-1000.0, 1000.0])
def test_where_the_sigmoid_saturates_loss_and_gradient_stay_finite_and_equal_pytorch_s(pixel, logit):
    ours, theirs = (torch.full((1, 784), logit, requires_grad=True) for _ in range(2))
    x = torch.full((1, 784), pixel)
    loss = quest.loss_function(torch.sigmoid(ours), x, *prior(1))
    expected = F.binary_cross_entropy(torch.sigmoid(theirs), x, reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.isfinite(loss) and torch.isfinite(ours.grad).all()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_nan_in_the_reconstruction_makes_the_loss_nan():
    recon_x = torch.rand(2, 784)
    recon_x[1, 5] = float("nan")
    assert quest.loss_function(recon_x, torch.rand(2, 784), *prior(2)).isnan()


def test_a_reconstruction_of_another_shape_than_the_digits_is_refused():
    with pytest.raises(ValueError, match=r"recon_x is \(4, 784\), but x is \(1, 784\)"):
        quest.loss_function(torch.rand(4, 784), torch.rand(1, 784), *prior(4))
