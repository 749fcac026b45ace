"""The VAE: its layers and its loss, held to torch.distributions; training, held to the textbook's steps."""

import pytest
import torch
import torch.nn.functional as F
from harness import Operations, adam_of, loader_of, operations_of_a_step
from plain import PlainVAE, plain_step
from torch import optim
from torch.distributions import Bernoulli, Normal, kl_divergence

import quest_12_1 as quest


# Model ---------------------------------------------------------------------------------------------------------------
def test_the_model_has_the_recipe_s_layers_and_631188_parameters(model):
    layers = {"fc1": (400, 784), "fc21": (2, 400), "fc22": (2, 400), "fc3": (400, 2), "fc4": (784, 400)}
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 631_188


@pytest.mark.parametrize("n", [1, 5])
def test_forward_takes_flat_or_square_digits_and_returns_reconstruction_mu_and_logvar(model, n):
    x, both = torch.rand(n, 1, 28, 28), []
    for shape in ((n, 784), (n, 1, 28, 28)):
        torch.manual_seed(1)
        both.append(model(x.view(shape)))
        assert [tuple(part.shape) for part in both[-1]] == [(n, 784), (n, 2), (n, 2)]
    assert all(torch.equal(flat, square) for flat, square in zip(*both, strict=True))


def test_encode_and_decode_are_what_their_layers_compute_and_pixels_stay_in_0_to_1_far_out_in_the_plane(model):
    def layer(name, x):
        return x @ getattr(model, name).weight.T + getattr(model, name).bias

    x, z = torch.rand(4, 784), torch.tensor([[0.0, 0.0], [1e4, -1e4], [-3.0, 40.0]])
    hidden = layer("fc1", x).clamp(min=0)
    for part, name in zip(model.encode(x), ("fc21", "fc22"), strict=True):
        torch.testing.assert_close(part, layer(name, hidden))
    images = model.decode(z)
    assert images.shape == (3, 784) and images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, 1 / (1 + torch.exp(-layer("fc4", layer("fc3", z).clamp(min=0)))))


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


# Loss ----------------------------------------------------------------------------------------------------------------
def test_both_parts_are_what_torch_distributions_computes():
    mu, logvar = 3 * torch.randn(50, 2, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    q, p = Normal(mu, torch.exp(logvar / 2)), Normal(torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(quest.kl_divergence(mu, logvar), kl_divergence(q, p).sum())
    assert quest.kl_divergence(torch.zeros(7, 2), torch.zeros(7, 2)) == 0
    recon_x = torch.rand(20, 784, dtype=torch.float64) * 0.98 + 0.01
    x = torch.bernoulli(torch.rand(20, 784, dtype=torch.float64))
    torch.testing.assert_close(quest.reconstruction_error(recon_x, x), -Bernoulli(recon_x).log_prob(x).sum())


def test_the_loss_is_the_sum_of_both_in_value_and_gradient():
    logits, x = 3 * torch.randn(128, 784), torch.rand(128, 784)
    mu, logvar = torch.randn(128, 2), torch.randn(128, 2)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = quest.loss_function(torch.sigmoid(ours), x, mu, logvar)
    expected = F.binary_cross_entropy_with_logits(theirs, x, reduction="sum") + quest.kl_divergence(mu, logvar)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(loss, quest.loss_function(torch.sigmoid(ours), x.view(-1, 1, 28, 28), mu, logvar))
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)

    parts = [torch.rand(3, width, dtype=torch.float64) * 0.9 + 0.05 for width in (784, 784, 2, 2)]
    for part in (0, 2, 3):
        parts[part].requires_grad_()
    assert torch.autograd.gradcheck(quest.loss_function, parts, fast_mode=True)


# Training ------------------------------------------------------------------------------------------------------------
def test_the_digits_are_what_the_dataset_gives_image_by_image(mnist, digits):
    assert digits.shape == (60_000, 784) and digits.dtype == torch.float32
    for index in (0, 1, 31_415, 59_999):
        assert torch.equal(digits[index], mnist[0][index][0].view(784))
    assert digits.min() == 0 and digits.max() == 1


def test_an_epoch_visits_every_digit_once_in_469_batches_in_a_new_order_that_the_seed_decides():
    indices = torch.arange(60_000)
    loader = loader_of(indices)
    torch.manual_seed(4)
    batches, second = list(loader), torch.cat(list(loader))
    assert len(batches) == len(loader) == 469
    assert {len(batch) for batch in batches[:-1]} == {128} and len(batches[-1]) == 96
    first = torch.cat(batches)
    assert torch.equal(first.sort().values, indices)
    assert (first == second).float().mean() < 0.01 and (first == indices).float().mean() < 0.01
    torch.manual_seed(4)
    assert torch.equal(first, torch.cat(list(loader)))


def test_training_takes_the_textbook_s_steps_and_returns_and_shows_the_average_loss_of_each_epoch(digits, capsys):
    ours, reference, x, seen = quest.VAE(), PlainVAE(), digits[:1000], []
    reference.load_state_dict(ours.state_dict())
    adam, before = optim.Adam(reference.parameters(), lr=1e-3), ours.fc1.weight.detach().clone()
    torch.manual_seed(1)
    losses = quest.train(ours, x, 4, after_epoch=lambda: seen.append(ours.fc1.bias.sum().item()))
    torch.manual_seed(1)
    expected = [sum(plain_step(reference, adam, batch) for batch in loader_of(x)) / 1000 for _ in range(4)]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=2e-4, rtol=1e-3)
    assert (ours.fc1.weight - before).abs().max() > 0.01  # 32 steps of Adam went somewhere
    assert len(set(seen)) == 4 and seen[-1] == ours.fc1.bias.sum().item()  # after each epoch, not before
    bars = capsys.readouterr().err
    for epoch, loss in enumerate(losses, start=1):
        assert f"Epoch {epoch}/4: 100%" in bars and f"loss {loss:.2f} nats per image" in bars


def test_the_held_out_loss_is_the_average_of_both_parts_and_of_their_sum(model, digits):
    x = digits[:500]
    torch.manual_seed(3)
    loss = quest.evaluate(model, x)
    torch.manual_seed(3)
    recon_x, mu, logvar = model(x)
    bce, kld = quest.reconstruction_error(recon_x, x), quest.kl_divergence(mu, logvar)
    parts = {"total": bce + kld, "bce": bce, "kld": kld}
    assert loss == pytest.approx({name: part.item() / 500 for name, part in parts.items()}, rel=1e-5)


def test_a_whole_epoch_reads_the_device_once(model, digits):
    """Counted on the CPU: values that Python reads, and copies to the CPU. On a GPU each waits for all before it."""
    x, optimizer = digits[:2000], adam_of(model)

    def reads(loader):
        with Operations() as operations:
            quest.train_epoch(model, optimizer, loader, "Epoch")
        values = [tensors[0] for name, tensors in operations.calls if name == "_local_scalar_dense"]
        copies = [name for name, _ in operations.calls if name == "_to_copy"]
        return sum(value.is_floating_point() for value in values) + len(copies)  # the loader's own seed is an integer

    class Peeking(list):  # a loader with which the check fails
        def __iter__(self):
            return (batch + 0 * batch.sum().item() for batch in loader_of(x))

    assert reads(loader_of(x)) == 1 and reads(Peeking()) == 1 + 16


def test_a_training_step_computes_58_operations():
    """On a GPU the number of operations, not their arithmetic, is the time of a step."""
    assert len(operations_of_a_step("cpu")) <= 58
