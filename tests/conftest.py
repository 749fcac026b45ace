"""Fixtures: the digits, a model, working folders with real data, and two runs whose results many tests look at."""

import json

import pytest
import torch
from harness import ROOT, prepare, run, run_small

import quest_12_1 as quest


@pytest.fixture(scope="session")
def held_out():
    """The 10,000 held-out digits, (10000, 784), and their classes."""
    dataset = quest.load_data(ROOT / "data")[1]
    return quest.images_on("cpu", dataset), dataset.targets


@pytest.fixture(autouse=True)
def model():
    """A model before training, from the seed that also fixes what the test draws."""
    torch.manual_seed(0)
    return quest.VAE()


@pytest.fixture
def folder(tmp_path):
    """A working folder with MNIST and the gallery's template."""
    return prepare(tmp_path)


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    """A gallery run of two epochs on few digits, into a folder that has to be made: that folder, and its result."""
    folder = prepare(tmp_path_factory.mktemp("gallery"))
    result = run_small(folder, "--gallery", "--json", "--epochs", "2", "--seed", "3", "--output", "runs/seed 3")
    assert result.returncode == 0 and not (folder / "dreams" / "dream_sample.png").exists(), result.stderr
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("\n")  # the one line of --json
    return folder / "runs" / "seed 3", json.loads(result.stdout)


@pytest.fixture(scope="session")
def main_job(tmp_path_factory):
    """The user's main job without a GPU, whole, with the gallery: 10 epochs on all digits."""
    folder = prepare(tmp_path_factory.mktemp("main_job"))
    return folder, run(folder, "--device", "cpu", "--gallery")
