"""Fixtures: working folders with real data, with the digits in them."""

import shutil

import pytest
import torch
from harness import RAW, copy_archives

import quest_12_1 as quest


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """A folder whose data/ holds MNIST packed and unpacked. Tests leave the data as it is."""
    folder = copy_archives(tmp_path_factory.mktemp("unpacked"))
    quest.repair_mnist(str(folder / "data"))
    return folder


@pytest.fixture(scope="session")
def mnist(unpacked):
    """(train_dataset, test_dataset), as the script loads them."""
    return quest.load_mnist(str(unpacked / "data"))


@pytest.fixture(scope="session")
def digits(mnist):
    """The 60,000 training digits as the script trains on them: (60000, 784)."""
    return quest.images_on("cpu", mnist[0])


@pytest.fixture
def folder(tmp_path, unpacked):
    """A working folder with MNIST unpacked, free to damage."""
    shutil.copytree(unpacked / RAW, tmp_path / RAW)
    return tmp_path


@pytest.fixture(autouse=True)
def fixed_noise():
    torch.manual_seed(0)


@pytest.fixture
def model(fixed_noise):
    return quest.VAE()
