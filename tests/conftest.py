"""Fixtures: working folders with real data, and the processes that run the script in them."""

import shutil

import pytest
import torch
from harness import Nursery, copy_archives

import quest_12_1 as quest


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """A folder whose data/ holds MNIST packed and unpacked. Tests only read it."""
    folder = tmp_path_factory.mktemp("unpacked")
    copy_archives(folder)
    quest.load_mnist(str(folder / "data"))
    return folder


@pytest.fixture(scope="session")
def mnist(unpacked):
    """(train_dataset, test_dataset), as the script loads them."""
    return quest.load_mnist(str(unpacked / "data"))


@pytest.fixture(scope="session")
def digits(mnist):
    """The 60,000 training digits as the script trains on them: (60000, 784)."""
    return quest.pixels_of(mnist[0], torch.device("cpu"))


@pytest.fixture
def clone(tmp_path):
    """A working folder like a fresh clone's: MNIST still packed, no dream yet."""
    copy_archives(tmp_path)
    return tmp_path


@pytest.fixture
def folder(tmp_path, unpacked):
    """A working folder with MNIST unpacked, free to damage."""
    shutil.copytree(unpacked / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="session")
def nurseries():
    """Two, so that the two cores are busy where many runs are wanted."""
    pair = Nursery(), Nursery()
    yield pair
    for nursery in pair:
        nursery.close()


@pytest.fixture
def nursery(nurseries):
    return nurseries[0]
