"""Training: the same steps as the textbook's, on every digit once an epoch."""

import copy
import itertools

import pytest
import torch
from harness import adam_of, loader_of
from plain import PlainVAE, plain_step
from torch import optim

import quest_12_1 as quest


def test_the_digits_are_what_the_dataset_gives_image_by_image(mnist, digits):
    dataset = mnist[0]
    assert digits.shape == (60_000, 784) and digits.dtype == torch.float32
    for index in (0, 1, 31_415, 59_999):
        assert torch.equal(digits[index], dataset[index][0].view(784))
    assert digits.min() == 0 and digits.max() == 1


def test_an_epoch_visits_every_digit_exactly_once_in_469_batches_the_last_of_96():
    indices = torch.arange(60_000)
    batches = list(loader_of(indices))
    assert len(batches) == len(loader_of(indices)) == 469
    assert {len(batch) for batch in batches[:-1]} == {128} and len(batches[-1]) == 96
    assert torch.equal(torch.cat(batches).sort().values, indices)


def test_each_epoch_has_a_new_order_and_a_seed_decides_it():
    loader = loader_of(torch.arange(60_000))
    torch.manual_seed(4)
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    torch.manual_seed(4)
    again = torch.cat(list(loader))
    assert torch.equal(first, again)
    assert (first == second).float().mean() < 0.01 and (first == torch.arange(60_000)).float().mean() < 0.01


def test_fed_the_same_batches_and_noise_a_step_reaches_the_textbook_s_weights(digits):
    torch.manual_seed(0)
    plain = PlainVAE()
    ours = quest.VAE()
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    ours_adam = adam_of(ours)
    plain_adam = optim.Adam(plain.parameters(), lr=1e-3)
    before = ours.fc1.weight.detach().clone()
    for step, x in enumerate(itertools.islice(loader_of(digits), 30)):
        torch.manual_seed(step)
        loss, mu, logvar = quest.train_step(ours, ours_adam, x)
        torch.manual_seed(step)
        expected = plain_step(plain, plain_adam, x)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert mu.shape == logvar.shape == (128, 2) and not loss.requires_grad and not mu.requires_grad
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=2e-4, rtol=1e-3)
    assert (ours.fc1.weight - before).abs().max() > 0.01  # 30 steps of Adam went somewhere


def test_an_epoch_reports_the_average_of_its_steps_losses_in_two_parts_that_add_up(digits, capsys):
    torch.manual_seed(0)
    model = quest.VAE()
    optimizer = adam_of(model)
    reference = copy.deepcopy(model)
    reference_adam = adam_of(reference)
    loader = loader_of(digits[:1000])
    torch.manual_seed(1)
    average = quest.train_epoch(model, optimizer, loader, "Epoch 1/1")
    torch.manual_seed(1)
    steps = [quest.train_step(reference, reference_adam, x) for x in loader]
    assert average.total == pytest.approx(sum(loss.item() for loss, _, _ in steps) / 1000, rel=1e-5)
    assert average.kld == pytest.approx(sum(quest.kl_divergence(*step[1:]).item() for step in steps) / 1000, rel=1e-4)
    shown = f"loss {average.total:.2f} nats an image (BCE {average.bce:.2f} + KLD {average.kld:.2f})"
    assert shown in capsys.readouterr().err


def test_held_out_loss_depends_on_model_and_seed_alone_and_disturbs_no_noise(digits):
    model, x = quest.VAE(), digits[:500]
    torch.manual_seed(8)
    expected_noise = torch.randn(4)
    torch.manual_seed(8)
    first = quest.evaluate(model, x, seed=3)
    assert torch.equal(torch.randn(4), expected_noise)
    assert first == quest.evaluate(model, x, seed=3) != quest.evaluate(model, x, seed=4)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        eps = torch.randn(500, 2, generator=torch.Generator().manual_seed(3))
        expected = quest.loss_function(model.decode(mu + torch.exp(logvar / 2) * eps), x, mu, logvar) / 500
    assert first.total == pytest.approx(expected.item(), rel=1e-5)
