"""The VAE: its layers and its loss, held to torch.distributions; training, held to the textbook's steps."""

import pytest
import torch
from harness import NO_BAR, ROOT, adam_of, operations_of_a_step
from plain import PlainVAE, plain_step
from torch import optim
from torch.distributions import Bernoulli, Normal, kl_divergence
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


@pytest.mark.parametrize("beta", [0, 1, 30])
def test_the_loss_is_bce_and_beta_times_kld_in_value_and_gradient_as_torch_distributions_computes(monkeypatch, beta):
    monkeypatch.setattr(quest, "BETA", beta)
    of = {"dtype": torch.float64, "requires_grad": True}
    inputs = logits, mu, logvar = torch.randn(50, 784, **of), torch.randn(50, 2, **of), torch.randn(50, 2, **of)
    x = torch.rand(50, 784, dtype=torch.float64)
    x[:25] = x[:25].round()  # black and white, where the others are grey
    recon_x = torch.sigmoid(3 * logits)
    loss, *parts = quest.loss_terms(recon_x, x, 3 * mu, logvar)
    bce = -Bernoulli(logits=3 * logits, validate_args=False).log_prob(x).sum()
    kld = kl_divergence(Normal(3 * mu, torch.exp(logvar / 2)), Normal(torch.zeros(2), torch.ones(2))).sum()
    torch.testing.assert_close([loss, *parts], [bce + beta * kld, bce, kld])
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(bce + beta * kld, inputs))
    assert torch.equal(quest.loss_function(recon_x, x.view(-1, 1, 28, 28), 3 * mu, logvar), loss)
    assert quest.loss_terms(recon_x, x, torch.zeros(50, 2), torch.zeros(50, 2))[2] == 0


def test_the_digits_are_what_the_dataset_gives_image_by_image_also_with_another_transform_than_totensor():
    turn, to_tensor = transforms.RandomRotation(10), transforms.ToTensor()
    for transform in (to_tensor, transforms.Compose([turn, to_tensor]), transforms.Compose([to_tensor, turn])):
        dataset = quest.DATASET(ROOT / "data", train=False, transform=transform)
        dataset.data, dataset.targets = dataset.data[:50], dataset.targets[:50]
        torch.manual_seed(2)
        x = quest.images_on("cpu", dataset)
        torch.manual_seed(2)
        assert torch.equal(x, torch.stack([dataset[index][0].view(784) for index in range(50)]))


def test_an_epoch_visits_every_digit_once_in_469_batches_in_a_new_order_that_the_seed_decides():
    indices = torch.arange(60_000)
    loader = quest.ShuffledBatches(indices, quest.BATCH_SIZE)
    torch.manual_seed(4)
    batches, second = list(loader), torch.cat(list(loader))
    assert [len(batch) for batch in batches] == 468 * [128] + [96] and len(loader) == 469
    first = torch.cat(batches)
    assert torch.equal(first.sort().values, indices)
    assert (first == second).float().mean() < 0.01 and (first == indices).float().mean() < 0.01
    torch.manual_seed(4)
    assert torch.equal(first, torch.cat(list(loader)))


def test_training_takes_the_textbook_s_steps_and_returns_the_average_loss_also_if_it_is_evaluated(model, held_out):
    reference, x, eps = PlainVAE(), held_out[0][:1000], torch.randn(1000, 2)
    reference.load_state_dict(model.state_dict())
    ours, theirs = adam_of(model), optim.Adam(reference.parameters(), lr=1e-3)
    batches, before = quest.ShuffledBatches(x, 128), model.fc1.weight.detach().clone()
    torch.manual_seed(1)
    losses = [(quest.train_epoch(model, ours, batches, NO_BAR), quest.evaluate(model, x, eps))[0] for _ in range(4)]
    torch.manual_seed(1)
    expected = [sum(plain_step(reference, theirs, batch) for batch in batches) / 1000 for _ in range(4)]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=2e-4, rtol=1e-3)
    assert (model.fc1.weight - before).abs().max() > 0.01  # 32 steps of Adam went somewhere


def test_the_average_loss_of_a_bfloat16_model_is_summed_in_float32(model, monkeypatch):
    monkeypatch.setattr(quest, "loss_function", lambda recon_x, *_: 0 * recon_x.sum() + 1)
    model.bfloat16()  # it has 8 bits of precision: a sum would stop at 256
    assert quest.train_epoch(model, adam_of(model), 469 * [torch.rand(1, 784).bfloat16()], NO_BAR) == 1


def test_the_held_out_loss_is_the_average_of_the_loss_and_its_parts_and_leaves_training_s_noise_alone(model, held_out):
    x, eps, noise = held_out[0][:500], torch.randn(500, 2), torch.get_rng_state()
    loss, bce, kld = quest.evaluate(model, x, eps)
    assert torch.equal(torch.get_rng_state(), noise)
    mu, logvar = model.encode(x)
    expected = quest.loss_terms(model.decode(mu + torch.exp(logvar / 2) * eps), x, mu, logvar)
    assert (loss, bce, kld) == pytest.approx([term.item() / 500 for term in expected], rel=1e-5)
    assert 480 < bce < 600  # of an untrained model: about 784 ln 2 = 543


def test_a_training_step_computes_58_operations(monkeypatch):
    """On a GPU the number of operations, not their arithmetic, is the time of a step."""
    assert operations_of_a_step("cpu") <= 58
    monkeypatch.setattr(quest, "BETA", 30)
    assert operations_of_a_step("cpu") <= 59  # the gradient of KLD is multiplied as well
