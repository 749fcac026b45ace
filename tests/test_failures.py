"""The promises for bad days: nothing lost, nothing half-written, every failure one clear message.

The faults are real: signals, full and read-only file systems, damaged bytes, silent servers, starts at one moment.
"""

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from harness import NO_NETWORK, RAW, ROOT, SCRIPT, SMALL, Run, copy_archives, only_message, run_small

import quest_12_1 as quest

ARCHIVES = {name for name, _ in quest.DATASET.resources}
UNPACKED = {name.removesuffix(".gz") for name in ARCHIVES}
TRAIN, TRAIN_GZ = f"{RAW}/train-images-idx3-ubyte", f"{RAW}/train-images-idx3-ubyte.gz"
EARLIER = b"an earlier picture"

# Root ignores permissions unless it gives up the right to: this drops CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH,
# capabilities 1 and 2, in the layout that the kernel's capset takes.
WITHOUT_PRIVILEGE = """
import ctypes, struct
libc = ctypes.CDLL(None)
header, data = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0)), ctypes.create_string_buffer(24)
assert libc.capget(header, data) == 0
sets = [word & ~0b110 if index < 3 else word for index, word in enumerate(struct.unpack("6I", data.raw))]
assert libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *sets))) == 0
"""


def with_earlier_picture(folder):
    (folder / "dreams").mkdir(exist_ok=True)
    (folder / "dreams" / "dream_sample.png").write_bytes(EARLIER)


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".part-")}  # of killed runs


def picture(folder):
    """What dreams/ holds, which is one picture: the "earlier" one, a "whole" one, or a "broken" one."""
    assert visible(folder / "dreams") - {"filler"} == {"dream_sample.png"}
    data = (folder / "dreams" / "dream_sample.png").read_bytes()
    whole = data.startswith(b"\x89PNG\r\n") and data.endswith(b"IEND\xaeB`\x82")
    return "earlier" if data == EARLIER else "whole" if whole else "broken"


def leftovers(folder):
    return list(folder.rglob(".part-*"))


def files(folder):
    """Every file in `folder` with its bytes, but for what the run itself printed."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.stem != "run"}


def assert_data_sound(folder):
    assert visible(folder / RAW) == ARCHIVES | UNPACKED
    for archive, md5 in quest.DATASET.resources:
        for name, expected in ((archive, md5), (archive.removesuffix(".gz"), quest.UNPACKED_MD5[md5])):
            assert hashlib.md5((folder / RAW / name).read_bytes()).hexdigest() == expected


def damage(path, how):
    data = path.read_bytes()
    damaged = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "garbage": random.Random(0).randbytes(len(data)),
        "one bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "a wrong count": data[:4] + (int.from_bytes(data[4:8], "big") - 1).to_bytes(4, "big") + data[8:],
    }
    path.write_bytes(damaged[how])


# Killed --------------------------------------------------------------------------------------------------------------
def test_24_kills_spread_over_a_run_leave_a_whole_picture_and_data_that_the_next_run_mends(tmp_path):
    """Many, since a file that is half written for a millisecond is met by chance only; most fall on the unpacking."""
    folder, fates, seen, length = copy_archives(tmp_path), [], set(), 60
    with_earlier_picture(folder)
    for kill in range(24, -1, -1):
        for name in UNPACKED:
            (folder / RAW / name).unlink(missing_ok=True)
        begun, process = time.monotonic(), Run(folder, "--epochs", "1")
        if process.ends_within(kill / 24 * length):
            length = time.monotonic() - begun  # of a whole run; measured anew, since machines waver
        process.send(signal.SIGKILL)
        fates.append(process.wait().returncode)
        assert picture(folder) != "broken"
        seen.add(len(visible(folder / RAW)))
        with_earlier_picture(folder)
    assert fates.count(-signal.SIGKILL) >= 15 and set(fates) <= {-signal.SIGKILL, 0}
    assert len(seen) > 1 and 0 < len(leftovers(folder)) <= 24  # kills met the unpacking; each left one at most
    assert run_small(folder, "--epochs", "1").returncode == 0 and picture(folder) == "whole"
    assert_data_sound(folder)


@pytest.mark.parametrize("moment", ["PIL.Image.Image.save", "os.replace"])
def test_a_kill_between_writing_the_picture_and_moving_it_loses_neither(folder, moment):
    with_earlier_picture(folder)
    killed = f"import os, PIL.Image; {moment} = lambda *paths, **_: os.kill(os.getpid(), 9)"
    assert run_small(folder, "--epochs", "1", prelude=killed).returncode == -signal.SIGKILL
    assert picture(folder) == "earlier"
    assert run_small(folder, "--epochs", "1").returncode == 0 and picture(folder) == "whole"


# Faults that are there from the start --------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "one bit", "a wrong count"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_unpacked_file_is_noticed_said_and_unpacked_again(folder, monkeypatch, capsys, name, how):
    monkeypatch.chdir(folder)
    damage(folder / RAW / name, how)
    quest.repair_mnist("data")
    assert [len(dataset) for dataset in quest.load_mnist("data")] == [60_000, 10_000]
    assert_data_sound(folder)
    assert not leftovers(folder)
    assert capsys.readouterr().err == f"{RAW}/{name} has a wrong MD5 checksum: unpacking it again.\n"


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory):
    """Python that makes a process download from a server here: of the archives, of something else, or a silent one."""
    other = tmp_path_factory.mktemp("other")
    for name in ARCHIVES:
        (other / name).write_bytes(gzip.compress(b"a hotel's login page"))
    silent = socket.create_server(("127.0.0.1", 0))
    ports = {"silent": silent.getsockname()[1]}
    for name, folder in (("archives", ROOT / RAW), ("other", other)):
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ports[name] = server.server_port
    python = "import torchvision; torchvision.datasets.MNIST.mirrors = ['http://127.0.0.1:{}/']\n"
    yield {name: python.format(port) for name, port in ports.items()}
    silent.close()


def unlink(*paths):
    return lambda folder: [(folder / path).unlink() for path in paths]


MENDED = {  # what is done to a folder with unpacked data, and Python that the process executes first
    "an unpacked file is damaged": (lambda f: damage(f / TRAIN, "truncated"), ""),
    "an unpacked file and its archive are gone": (unlink(TRAIN, TRAIN_GZ), ""),
    "an unpacked file is gone, its archive damaged": (lambda f: (unlink(TRAIN)(f), damage(f / TRAIN_GZ, "empty")), ""),
    "the data is sound but cannot be written": (lambda f: (f / RAW).chmod(0o555), WITHOUT_PRIVILEGE),
}


@pytest.mark.parametrize("fault", MENDED)
def test_a_fault_that_archives_or_the_network_can_mend_is_mended_and_training_goes_on(folder, mirrors, fault):
    make, prelude = MENDED[fault]
    make(folder)
    result = run_small(folder, "--epochs", "1", prelude=prelude + mirrors["archives"], **NO_NETWORK)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f"{TRAIN} has a wrong MD5 checksum") == (fault == "an unpacked file is damaged")
    assert_data_sound(folder)


REFUSED = ("./data", "Missing or damaged: train-images-idx3-ubyte.gz\n", "refused", "git checkout -- data")
FAULTS = {  # what is done to a folder with unpacked data, Python to execute first or the mirror, what is said
    "the archive has a wrong bit": (lambda f: (unlink(TRAIN)(f), damage(f / TRAIN_GZ, "one bit")), "", REFUSED),
    "the archive is missing": (unlink(TRAIN, TRAIN_GZ), "", REFUSED),
    "there is no data at all": (lambda f: shutil.rmtree(f / "data"), "", (*ARCHIVES, *REFUSED)),
    "the proxy's address makes no sense": (
        unlink(TRAIN, TRAIN_GZ),
        "import os; os.environ.update(http_proxy='http://.bad:1', https_proxy='http://.bad:1')",
        REFUSED[:2],
    ),
    "the server sends something else": (unlink(TRAIN, TRAIN_GZ), "other", (*REFUSED[:2], "corrupted")),
    "the server never answers": (unlink(TRAIN, TRAIN_GZ), "silent", (*REFUSED[:2], "timed out")),
    "data cannot be unpacked": (
        lambda f: (unlink(TRAIN)(f), (f / RAW).chmod(0o555)), WITHOUT_PRIVILEGE, ("./data", "Permission denied"),
    ),
    "data cannot be read": (lambda f: (f / TRAIN).chmod(0), WITHOUT_PRIVILEGE, ("./data", "Permission denied")),
    "dreams is a file": (lambda f: (f / "dreams").write_text("not a folder"), "", ("./dreams",)),
    "a folder is in the picture's place": (
        lambda f: (f / "dreams/dream_sample.png").mkdir(parents=True), "", ("Is a directory: 'dreams/dream_sample",),
    ),
    "dreams cannot be written": (
        lambda f: (with_earlier_picture(f), (f / "dreams").chmod(0o555)), WITHOUT_PRIVILEGE, ("./dreams", "Permission"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_any_other_fault_is_one_message_within_a_minute_and_changes_nothing(folder, mirrors, fault):
    make, prelude, said = FAULTS[fault]
    make(folder)
    before, begun = files(folder), time.monotonic()
    result = run_small(folder, "--epochs", "1", prelude=mirrors.get(prelude, prelude), **NO_NETWORK)
    assert result.returncode == 1
    if fault != "the server sends something else":  # the download has its own bar
        only_message(result)
    assert all(text in result.stderr for text in said) and "Traceback" not in result.stderr, result.stderr
    assert files(folder) == before and time.monotonic() - begun < 60


def test_training_makes_no_network_call(folder):
    hook = "lambda event, _: event.startswith('socket.') and sys.exit('a network call')"
    forbid = f"import sys; sys.addaudithook({hook})\n"
    result = run_small(folder, "--epochs", "1", "--gallery", prelude=forbid)
    assert result.returncode == 0, result.stderr
    assert "a network call" in run_small(folder, prelude=forbid + "import socket; socket.socket()").stderr


# Disks that are full -------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def small_disk(path, size):
    """Mount a real file system of `size` at `path`; skips where this user may not."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(folder):
    """Use up the last byte of the file system under `folder`."""
    with open(folder / "filler", "wb", buffering=0) as filler:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while filler.write(bytes(size)):
                    pass


@pytest.mark.parametrize("full", ["before training", "during training"])
def test_dreams_on_a_full_disk_are_one_message_and_the_earlier_picture_stays(folder, full):
    with small_disk(folder / "dreams", "4m"):
        with_earlier_picture(folder)
        if full == "before training":
            fill(folder / "dreams")
        process = Run(folder, "--epochs", "20")
        if full == "during training":
            process.says("Epoch 1/20")
            fill(folder / "dreams")
        assert process.wait().returncode == 1
        assert process.stderr.splitlines()[-1].startswith("quest_12_1.py: no picture was saved in ./dreams: ")
        assert "No space left on device" in process.stderr and "Traceback" not in process.stderr
        assert ("Epoch" in process.stderr) == (full == "during training")
        assert picture(folder) == "earlier" and not leftovers(folder)


def test_a_disk_that_is_full_while_unpacking_is_one_message_and_nothing_stays_behind(tmp_path):
    with small_disk(tmp_path / "data", "40m"):
        copy_archives(tmp_path)
        result = run_small(tmp_path)
        assert result.returncode == 1 and "No space left on device" in only_message(result)
        assert visible(tmp_path / RAW) == ARCHIVES and not leftovers(tmp_path)


# Ctrl-C, devices that fail, bugs -------------------------------------------------------------------------------------
@pytest.mark.parametrize("moment", ["torchvision.transforms.ToTensor", "training", "PIL.Image.Image.save"])
def test_ctrl_c_ends_the_run_with_one_line_and_the_earlier_picture(folder, moment):
    with_earlier_picture(folder)
    if moment == "training":
        process = Run(folder, "--json", "--epochs", "100")
        process.says("Epoch 2/100")
        process.send(signal.SIGINT)
    else:  # a real signal, sent when the script gets there: before and after training
        interrupt = f"import os, torchvision, PIL.Image; {moment} = lambda *_, **__: os.kill(os.getpid(), 2)"
        process = Run(folder, "--json", "--epochs", "1", prelude=interrupt)
    assert process.wait().returncode == 130, process.stderr
    assert process.stderr.splitlines()[-1] == "quest_12_1.py: stopped by Ctrl-C." and "Traceback" not in process.stderr
    assert json.loads(process.stdout) == {"success": False, "message": "stopped by Ctrl-C."}
    assert picture(folder) == "earlier" and not leftovers(folder)


@pytest.mark.parametrize("device", ["cuda:7", "meta", "mps", "xpu", "hpu", "banana", "", "cuda:-1"])
def test_a_device_that_is_not_there_is_one_message_with_the_reason(tmp_path, monkeypatch, capsys, device):
    try:
        torch.zeros(1, device=device).item()
        pytest.skip(f"{device} is there")
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error)[:40].split("\n")[0]
    monkeypatch.chdir(tmp_path)
    assert quest.main(["--json", "--device", device]) == 1
    out, err = capsys.readouterr()
    assert f"PyTorch cannot use the device '{device}': {reason}" in err and len(err) < 800
    assert err == f"quest_12_1.py: {json.loads(out)['message']}\n" and out.count("\n") == 1
    assert json.loads(out)["success"] is False and list(tmp_path.iterdir()) == []


BUG = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


BROKEN = "CUDA call failed lazily at initialization"
LOST, CUBLAS = "CUDA error: unspecified launch failure", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."


@pytest.mark.parametrize("first_line", ["CUDA out of memory. Tried to allocate 20.00 MiB.", LOST, CUBLAS, BROKEN, BUG])
def test_a_gpu_that_fails_is_one_message_by_its_first_line_but_a_bug_keeps_its_traceback(folder, first_line):
    where, error = (
        ("zeros", "torch.cuda.DeferredCudaCallError") if first_line == BROKEN else ("sigmoid", "RuntimeError")
    )
    failing = f"import torch\ndef failing(*_, **__): raise {error}({first_line!r} + '\\nFor debugging ...')\n"
    result = run_small(folder, prelude=f"{failing}torch.{where} = failing")
    assert result.returncode == 1
    if first_line == BUG:
        assert "Traceback" in result.stderr and "in decode" in result.stderr
    else:
        assert result.stderr.count("quest_12_1.py: ") == 1 and f": {first_line}\n" in result.stderr
        assert "For debugging" not in result.stderr and "Traceback" not in result.stderr


# Many at once, and readers that leave --------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "archives"), [(2, "there"), (8, "there"), (8, "to download")])
def test_runs_started_at_one_moment_all_succeed(tmp_path, mirrors, count, archives):
    if archives == "there":
        copy_archives(tmp_path)
    settings = {
        "prelude": "import torch; torch.set_num_threads(1)\n" + ("" if archives == "there" else mirrors["archives"]),
        **NO_NETWORK,
    }
    runs = [Run(tmp_path, "--epochs", "1", name=str(k), **settings) for k in range(count)]
    codes = [run.wait().returncode for run in runs]
    assert codes == [0] * count, [run.stderr for run in runs]
    assert len({run.stdout.split("held-out loss ")[1] for run in runs}) == 1  # all trained on the same digits
    assert all("wrong" not in run.stderr for run in runs)
    assert picture(tmp_path) == "whole" and not leftovers(tmp_path)
    assert_data_sound(tmp_path)


@pytest.mark.parametrize("reader", ["head -1", "true"])
def test_a_reader_of_standard_output_that_leaves_early_does_not_stop_the_dream(folder, reader):
    program = f"{SMALL}import runpy, sys; sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path(sys.argv[0], None, '__main__')"
    line = f"'{sys.executable}' -c \"$0\" --device cpu --epochs 1 | {reader}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line, program], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr and picture(folder) == "whole"
