"""Fixtures: the digits, clones to work in, and the runs that many tests look at."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from subprocess import CompletedProcess
from typing import NamedTuple

# Each test decides for itself whether there are progress bars, and none has a network:
# what would ask for one finds a proxy that refuses. TQDM_DISABLE and the proxies are
# read when tqdm, the browser's driver and the children start.
for name in ("TQDM_DISABLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
    os.environ.pop(name, None)
    os.environ.pop(name.lower(), None)
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"
os.environ["no_proxy"] = "127.0.0.1,localhost"

import pytest
import torch
from harness import (
    MNIST,
    ROOT,
    SMALL,
    end_processes,
    expect_success,
    make_clone,
    read_idx,
    run_gallery,
    run_script,
    start_server,
    write_split,
)

import quest_12_1 as quest

FEW = 2000  # digits of a small run: so many that the page finds its 100 of each class


def pytest_addoption(parser):
    parser.addoption(
        "--trained",
        metavar="FOLDER",
        help="take FOLDER/dream_model.pt for the main job's model: nothing is trained",
    )


@pytest.fixture(autouse=True)
def fresh_state():
    """Begin each test with the same seed, with one thread, and with denormals."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


# ---- Digits --------------------------------------------------------------------------
@pytest.fixture(scope="session")
def held_out():
    """The 10,000 held-out digits, (10000, PIXELS), and their classes, (10000,)."""
    dataset = quest.load_data(ROOT / "data")[1]
    return quest.images_on("cpu", dataset), dataset.targets


@pytest.fixture(scope="session")
def digits(held_out):
    """Held-out digits alone, for tests that train or measure on some of them."""
    return held_out[0]


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """A folder like the clone's data, with FEW digits to train on and FEW held out."""
    root = tmp_path_factory.mktemp("few")
    for split in ("train", "t10k"):
        images = read_idx(MNIST / f"{split}-images-idx3-ubyte")[:FEW]
        labels = read_idx(MNIST / f"{split}-labels-idx1-ubyte")[:FEW]
        write_split(root / "MNIST" / "raw", split, images, labels)
    return root


# ---- Places to work in ---------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, few_digits, monkeypatch):
    """A clone with few digits, which is the current folder too."""
    monkeypatch.chdir(make_clone(tmp_path, few_digits))
    return tmp_path


@pytest.fixture
def own_data(folder, few_digits):
    """The clone of `folder`, with data of its own that a test may damage: the folder
    of the four files."""
    (folder / "data").unlink()
    shutil.copytree(few_digits, folder / "data")
    return folder / "data" / "MNIST" / "raw"


@pytest.fixture
def fashion(own_data):
    """Let the clone of `folder` have FashionMNIST and no MNIST: MNIST's files stand in,
    since they have the same names."""
    own_data.parent.rename(own_data.parents[1] / "FashionMNIST")


@pytest.fixture
def call(capsys):
    """A way to call a program's `main` within this process: call(quest.main, "--json").

    It returns what a process would: returncode, which is main's or SystemExit's code,
    stdout and stderr.
    """

    def call_main(main, *arguments):
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return CompletedProcess(arguments, code, out, err)

    return call_main


# ---- Runs ----------------------------------------------------------------------------
class Job(NamedTuple):
    """A run of the script: its folder, that of what it saved, and how it ended."""

    folder: object  # the clone
    output: object  # where dream_model.pt lies
    result: object  # returncode, stdout and stderr; None if it was not run here


@pytest.fixture(scope="session")
def small_run(tmp_path_factory, few_digits):
    """A run of two epochs on few digits, into a folder that has to be made."""
    folder = make_clone(tmp_path_factory.mktemp("small"), few_digits)
    result = run_script(folder, *SMALL, "--output", "runs/seed 3")
    expect_success(result)
    return Job(folder, folder / "runs" / "seed 3", result)


@pytest.fixture(scope="session")
def small_gallery(tmp_path_factory, small_run):
    """The gallery of `small_run`, drawn in a copy of its clone."""
    folder = tmp_path_factory.mktemp("gallery") / "clone"
    shutil.copytree(small_run.folder, folder, symlinks=True)
    result = run_gallery(folder, "runs/seed 3")
    expect_success(result)
    return Job(folder, folder / "runs" / "seed 3", result)


@pytest.fixture(scope="session")
def main_run(tmp_path_factory):
    """The main job, begun: its clone, and a future of how it ends.

    It has one thread, as tests run beside it: with more, all of them crawl.
    """
    folder = make_clone(tmp_path_factory.mktemp("main_job"), ROOT / "data")
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_script, folder)
        yield folder, run
        # Where the session ends early. Again and again, since the job may not have
        # begun its process yet.
        while not run.done():
            end_processes()
            wait([run], timeout=0.1)


@pytest.fixture(scope="session", autouse=True)
def begin_early(request):
    """Begin, before the first test, what later ones would have to wait for."""
    start_server()
    if request.config.getoption("--trained"):
        return
    if any(looks_at_main_job(item) for item in request.session.items):
        request.getfixturevalue("main_run")


def looks_at_main_job(item):
    """Tell it by a test's fixtures; what a browser opens is a page of the main job."""
    return "main_job" in item.fixturenames or "browser" in item.fixturenames


def pytest_collection_modifyitems(items):
    """Let the tests that look at the main job come last, when it has ended."""
    items.sort(key=looks_at_main_job)


@pytest.fixture(scope="session")
def main_job(request, tmp_path_factory):
    """The user's main job without a GPU: 10 epochs on all digits.

    With --trained FOLDER it is not run: FOLDER's model is taken, and `result` is None.
    """
    trained = request.config.getoption("--trained")
    if trained:
        folder = make_clone(tmp_path_factory.mktemp("main_job"), ROOT / "data")
        shutil.copy(f"{trained}/dream_model.pt", folder / "dreams")
        return Job(folder, folder / "dreams", None)

    folder, run = request.getfixturevalue("main_run")
    expect_success(run.result())
    return Job(folder, folder / "dreams", run.result())


@pytest.fixture(scope="session")
def main_gallery(main_job):
    """The folder of the main job's model, in which the gallery has drawn it."""
    expect_success(run_gallery(main_job.folder))
    return main_job.output
