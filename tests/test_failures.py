"""The promises for bad days: nothing lost, nothing half-written, every failure one clear message.

The faults are real: signals, full and read-only file systems, damaged bytes, silent servers, starts at one moment.
"""

import concurrent.futures
import contextlib
import fcntl
import gzip
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from harness import NO_NETWORK, RAW, ROOT, SCRIPT, copy_archives, only_message, run

import quest_12_1 as quest

ARCHIVES = sorted(path.name for path in (ROOT / RAW).glob("*.gz"))
UNPACKED = [name.removesuffix(".gz") for name in ARCHIVES]
EARLIER = b"an earlier picture"

# Python for the child to run first. Two runs at once share two cores best with one thread each.
ONE_THREAD = "import torch; torch.set_num_threads(1)"

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


@contextlib.contextmanager
def small_disk(path, size):
    """Mount a real file system of `size` at `path`; skips where this user may not."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(folder):
    """Use up the last byte of the file system under `folder`."""
    with open(folder / "filler", "wb", buffering=0) as filler:
        with contextlib.suppress(OSError):
            while filler.write(bytes(1 << 16)):
                pass
        with contextlib.suppress(OSError):
            while filler.write(b"."):
                pass


def with_earlier_picture(folder):
    (folder / "dreams").mkdir(exist_ok=True)
    (folder / "dreams" / "dream_sample.png").write_bytes(EARLIER)


def picture(folder):
    return (folder / "dreams" / "dream_sample.png").read_bytes()


def whole(png):
    return png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")


def contents(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_data_sound(folder):
    assert contents(folder / RAW) - {".lock"} == {*ARCHIVES, *UNPACKED}
    for name, md5 in {**quest.UNPACKED_MD5, **dict(quest.MNIST.resources)}.items():
        assert hashlib.md5((folder / RAW / name).read_bytes()).hexdigest() == md5


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(
        {
            "truncated": data[: len(data) // 2],
            "empty": b"",
            "garbage": random.Random(0).randbytes(len(data)),
            "one bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "a wrong count": data[:4] + (int.from_bytes(data[4:8], "big") - 1).to_bytes(4, "big") + data[8:],
        }[how]
    )


# Killed --------------------------------------------------------------------------------------------------------------


def kill_many(nurseries, folders, moments):
    """Start a run of one epoch and kill it at each of `moments`, two at a time; check the files after each.

    The moments are fractions of a whole run, whose length is measured anew whenever one ends before its kill, since
    machines waver. Returns how the runs ended.
    """

    def worker(nursery, folder, moments):
        fates, length = [], None
        for moment in moments:
            with_earlier_picture(folder)
            begun = time.monotonic()
            process = nursery.start(folder, "--epochs", "1", prelude=ONE_THREAD)
            if process.ends_within(60 if length is None else moment * length):
                length = time.monotonic() - begun
            process.send(signal.SIGKILL)
            fates.append(process.wait())
            assert picture(folder) == EARLIER or whole(picture(folder))
            assert contents(folder / "dreams") <= {"dream_sample.png", ".lock", ".part"}
        return fates

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        halves = pool.map(worker, nurseries, folders, (moments[::2], moments[1::2]))
        return [fate for half in halves for fate in half]


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.endurance)])
def test_kills_spread_over_a_whole_run_leave_a_whole_picture_and_a_run_that_works(nurseries, tmp_path, unpacked, kills):
    """Many and slow, since a file that is half written for a millisecond is met by chance only."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(unpacked / "data", folder / "data")
    moments = [k / kills for k in range(kills, 0, -1)]
    fates = kill_many(nurseries, folders, [1, 1, *moments])  # each side's first run is left to end, for its length
    assert fates.count(-signal.SIGKILL) >= kills * 0.6 and set(fates) <= {-signal.SIGKILL, 0}
    for folder in folders:
        assert nurseries[0].run(folder, "--epochs", "1").returncode == 0
        assert whole(picture(folder))
        assert contents(folder / "dreams") == {"dream_sample.png", ".lock"}
        assert_data_sound(folder)


def test_20_kills_over_the_first_second_of_unpacking_leave_data_that_the_next_run_mends(nurseries, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        copy_archives(folder)

    seen = set()
    for k in range(20):
        folder = folders[k % 2]
        for name in UNPACKED:
            (folder / RAW / name).unlink(missing_ok=True)
        process = nurseries[k % 2].start(folder)
        process.listens()
        time.sleep(k / 20)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        left = contents(folder / RAW) - {".lock"}
        assert len(left) <= 2 * len(ARCHIVES + UNPACKED)  # one private copy at most
        seen.add(len(left))
    assert len(seen) > 1  # the kills met the unpacking at different moments
    for folder in folders:
        quest.load_mnist(str(folder / "data"))
        assert_data_sound(folder)


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_kill_between_writing_the_picture_and_moving_it_loses_neither(nursery, folder, moment):
    with_earlier_picture(folder)
    at_the_moment = {
        "write": "import os; os.fsync = lambda descriptor: os.kill(os.getpid(), 9)",
        "replace": "import os; os.replace = lambda *paths: os.kill(os.getpid(), 9)",
    }[moment]
    assert nursery.run(folder, "--epochs", "1", prelude=at_the_moment).returncode == -signal.SIGKILL
    assert picture(folder) == EARLIER
    assert contents(folder / "dreams") <= {"dream_sample.png", ".lock", ".part"}
    assert nursery.run(folder, "--epochs", "1").returncode == 0
    assert whole(picture(folder)) and contents(folder / "dreams") == {"dream_sample.png", ".lock"}


# Damaged, missing and unreachable data -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["truncated", "empty", "garbage", "one bit", "a wrong count"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_unpacked_file_is_noticed_said_and_unpacked_again(folder, monkeypatch, capsys, name, how):
    monkeypatch.chdir(folder)
    damage(folder / RAW / name, how)
    train_dataset, test_dataset = quest.load_mnist("data")
    assert (len(train_dataset), len(test_dataset)) == (60_000, 10_000)
    assert_data_sound(folder)
    assert capsys.readouterr().err == f"{RAW}/{name} is damaged (wrong MD5 sum): unpacking it again.\n"


def test_a_run_on_damaged_unpacked_data_says_one_line_and_trains_on_sound_digits(folder, nursery):
    damage(folder / RAW / "train-images-idx3-ubyte", "truncated")
    result = nursery.run(folder, "--epochs", "1", **NO_NETWORK)
    assert result.returncode == 0
    assert result.stderr.count("unpacking it again") == 1 and "train-images-idx3-ubyte is damaged" in result.stderr
    assert_data_sound(folder)


@pytest.mark.parametrize("how", ["truncated", "one bit", "missing"])
def test_without_a_sound_archive_and_without_network_it_names_the_file_and_what_to_do(clone, nursery, how):
    archive = clone / RAW / "train-images-idx3-ubyte.gz"
    archive.unlink() if how == "missing" else damage(archive, how)
    before = archive.read_bytes() if archive.exists() else None
    result = nursery.run(clone, "--epochs", "1", **NO_NETWORK)
    message = only_message(result)
    assert result.returncode == 1
    assert "./data" in message and "Missing or damaged: train-images-idx3-ubyte.gz\n" in message
    assert "Connection refused" in message and "git checkout -- data" in message
    assert not (clone / "dreams" / "dream_sample.png").exists()
    assert (archive.read_bytes() if archive.exists() else None) == before  # nothing lost
    assert contents(clone / RAW) - {".lock"} == {path.name for path in (clone / RAW).glob("*.gz")}


def test_a_proxy_address_that_makes_no_sense_is_one_message(clone, nursery):
    (clone / RAW / "train-labels-idx1-ubyte.gz").unlink()
    result = nursery.run(clone, http_proxy="http://.bad:1", https_proxy="http://.bad:1")
    assert result.returncode == 1 and "train-labels-idx1-ubyte.gz" in only_message(result)


def test_with_no_data_folder_at_all_and_no_network_it_says_the_same(tmp_path, nursery):
    result = nursery.run(tmp_path, **NO_NETWORK)
    assert result.returncode == 1
    assert all(name in only_message(result) for name in ARCHIVES)


def test_sound_unpacked_files_outlive_a_damaged_neighbour_that_cannot_be_mended(folder, nursery):
    for archive in (folder / RAW).glob("*.gz"):
        archive.unlink()
    damage(folder / RAW / "t10k-labels-idx1-ubyte", "empty")
    result = nursery.run(folder, **NO_NETWORK)
    assert result.returncode == 1 and "t10k-labels-idx1-ubyte is damaged" in result.stderr
    md5 = hashlib.md5((folder / RAW / "train-images-idx3-ubyte").read_bytes()).hexdigest()
    assert md5 == quest.UNPACKED_MD5["train-images-idx3-ubyte"]


def test_tensors_that_an_old_torchvision_left_are_not_trained_on(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "data" / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5)), folder / "data/MNIST/processed" / name)
    assert len(quest.load_mnist("data")[0]) == 60_000


class Mirror(http.server.BaseHTTPRequestHandler):
    """A proxy on this machine that serves MNIST's archives from the clone, and `corrupt` bytes where told to."""

    corrupt = False

    def do_GET(self):
        data = (ROOT / RAW / self.path.rsplit("/", 1)[1]).read_bytes()
        if self.corrupt:
            data = gzip.compress(b"a hotel's login page")
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def proxy(corrupt=False):
    handler = type("Handler", (Mirror,), {"corrupt": corrupt})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield {"http_proxy": address, "https_proxy": address, "no_proxy": ""}
        server.shutdown()


@pytest.mark.parametrize("how", ["missing", "one bit"])
def test_a_missing_or_damaged_archive_is_downloaded_and_checked(clone, nursery, how):
    archive = clone / RAW / "train-images-idx3-ubyte.gz"
    archive.unlink() if how == "missing" else damage(archive, how)
    with proxy() as environment:
        result = nursery.run(clone, "--epochs", "1", **environment)
    assert result.returncode == 0, result.stderr
    assert_data_sound(clone)


def test_a_download_of_something_else_is_not_taken_for_mnist(clone, nursery):
    (clone / RAW / "t10k-images-idx3-ubyte.gz").unlink()
    with proxy(corrupt=True) as environment:
        result = nursery.run(clone, **environment)
    assert result.returncode == 1
    assert "t10k-images-idx3-ubyte.gz" in result.stderr and "Traceback" not in result.stderr
    assert not (clone / RAW / "t10k-images-idx3-ubyte.gz").exists()


def test_a_network_that_accepts_and_never_answers_is_given_up_within_60_seconds(clone, monkeypatch):
    """The wait is measured with a timeout of 1 s and scaled, which saves the suite half a minute."""
    (clone / RAW / "train-labels-idx1-ubyte.gz").unlink()
    monkeypatch.chdir(clone)
    monkeypatch.setattr(quest, "NETWORK_TIMEOUT", 1)
    real_timeout = SCRIPT.read_text().split("NETWORK_TIMEOUT = ")[1].split()[0]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
        urllib.request.install_opener(None)  # urllib remembers the proxies of its first call
        begun = time.monotonic()
        with pytest.raises(quest.DreamError, match=r"(?s)\./data.*train-labels-idx1-ubyte\.gz.*timed out"):
            quest.load_mnist("data")
        waited = time.monotonic() - begun
    assert waited >= 1 and waited * float(real_timeout) < 60
    assert socket.getdefaulttimeout() is None


def test_training_makes_no_network_call(folder, nursery):
    forbid = (
        "import sys\n"
        "def hook(event, arguments):\n"
        "    if event.startswith('socket.'): raise PermissionError('a network call: ' + event)\n"
        "sys.addaudithook(hook)"
    )
    result = nursery.run(folder, "--epochs", "1", "--gallery", prelude=forbid)
    assert result.returncode == 0, result.stderr
    assert "a network call" in nursery.run(folder, prelude=forbid + "\nimport socket; socket.socket()").stderr


# Folders that cannot be written, disks that are full -----------------------------------------------------------------


def test_dreams_being_a_file_is_said_before_training(folder, nursery):
    (folder / "dreams").write_text("not a folder")
    result = nursery.run(folder)
    assert result.returncode == 1 and "./dreams" in only_message(result)
    assert (folder / "dreams").read_text() == "not a folder"


def test_a_folder_in_the_picture_s_place_is_said_before_training(folder, nursery):
    (folder / "dreams" / "dream_sample.png").mkdir(parents=True)
    result = nursery.run(folder)
    assert result.returncode == 1 and "Is a directory: 'dreams/dream_sample.png'" in only_message(result)


def test_dreams_that_cannot_be_written_are_said_before_training(folder, nursery):
    with_earlier_picture(folder)
    (folder / "dreams").chmod(0o555)
    result = nursery.run(folder, prelude=WITHOUT_PRIVILEGE)
    assert result.returncode == 1 and "Permission denied" in only_message(result)
    assert picture(folder) == EARLIER and contents(folder / "dreams") == {"dream_sample.png"}


def test_dreams_on_a_full_disk_are_said_before_training(folder, nursery):
    with small_disk(folder / "dreams", "1m"):
        with_earlier_picture(folder)
        fill(folder / "dreams")
        result = nursery.run(folder)
        assert result.returncode == 1 and "No space left on device" in only_message(result)
        assert picture(folder) == EARLIER
        assert contents(folder / "dreams") <= {"dream_sample.png", "filler", ".lock"}


def test_a_disk_that_fills_up_during_training_keeps_the_earlier_picture(folder, nursery):
    with small_disk(folder / "dreams", "1m"):
        with_earlier_picture(folder)
        process = nursery.start(folder, "--epochs", "1")
        process.says("Epoch 1/1")
        fill(folder / "dreams")
        assert process.wait() == 1
        assert process.stderr.splitlines()[-1].startswith("quest_12_1.py: no picture can be saved in ./dreams: ")
        assert "No space left on device" in process.stderr and "Traceback" not in process.stderr
        assert picture(folder) == EARLIER
        assert contents(folder / "dreams") == {"dream_sample.png", "filler", ".lock"}


def test_data_that_cannot_be_written_but_is_sound_will_do(folder, nursery):
    (folder / RAW).chmod(0o555)
    result = nursery.run(folder, "--epochs", "1", prelude=WITHOUT_PRIVILEGE)
    assert result.returncode == 0, result.stderr


def test_data_that_cannot_be_written_and_is_not_unpacked_is_one_message(clone, nursery):
    (clone / RAW).chmod(0o555)
    result = nursery.run(clone, prelude=WITHOUT_PRIVILEGE)
    assert result.returncode == 1 and "Permission denied" in only_message(result)


def test_a_disk_that_is_full_while_unpacking_is_one_message_and_nothing_stays_behind(tmp_path, nursery):
    with small_disk(tmp_path / "data", "40m"):
        raw = tmp_path / RAW
        raw.mkdir(parents=True)
        for name in ARCHIVES:
            shutil.copy(ROOT / RAW / name, raw)
        result = nursery.run(tmp_path)
        assert result.returncode == 1 and "No space left on device" in only_message(result)
        assert contents(raw) - {".lock"} == set(ARCHIVES)


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["at once", "loading", "training"])
def test_ctrl_c_and_sigterm_end_the_run_with_one_line_and_the_earlier_picture(folder, nursery, number, moment):
    with_earlier_picture(folder)
    process = nursery.start(folder, "--json")
    process.listens()
    if moment == "loading":
        time.sleep(0.2)
    if moment == "training":
        process.says("Epoch 2/10")
    process.send(number)
    assert process.wait() == 128 + number, process.stderr
    assert process.stderr.splitlines()[-1] == f"quest_12_1.py: stopped by {number.name}."
    assert "Traceback" not in process.stderr
    assert json.loads(process.stdout) == {"success": False, "message": f"stopped by {number.name}."}
    assert picture(folder) == EARLIER and contents(folder / "dreams") <= {"dream_sample.png", ".lock"}
    if moment == "training":
        assert process.stderr.endswith(f"\nquest_12_1.py: stopped by {number.name}.\n")


def test_an_impatient_user_who_presses_ctrl_c_many_times_sees_one_line(folder, nursery):
    process = nursery.start(folder)
    process.says("Epoch 1/10")
    for _ in range(20):
        process.send(signal.SIGINT)
        time.sleep(0.005)
    assert process.wait() == 130
    assert process.stderr.count("stopped by SIGINT") == 1 and "Traceback" not in process.stderr


# Numbers and devices that fail ---------------------------------------------------------------------------------------


def test_a_loss_that_diverges_stops_after_that_epoch_and_saves_no_picture(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(quest, "LEARNING_RATE", 1e30)
    with_earlier_picture(folder)
    assert quest.main(["--device", "cpu", "--epochs", "3"]) == 1
    out, err = capsys.readouterr()
    assert "training diverged: the loss is nan" in err and "Epoch 2" not in err and "Traceback" not in err
    assert "ready" not in out and picture(folder) == EARLIER


@pytest.mark.parametrize("device", ["cuda:7", "meta", "mps", "xpu", "hpu"])
def test_a_device_that_is_not_there_is_one_message_with_the_reason(tmp_path, monkeypatch, capsys, device):
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        no_backend = isinstance(error, NotImplementedError)
        reason = "this PyTorch is built without it" if no_backend else str(error)[:40].split("\n")[0]
    else:
        pytest.skip(f"{device} is there")
    monkeypatch.chdir(tmp_path)
    assert quest.main(["--device", device]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"PyTorch cannot use the device '{device}': {reason}" in err
    assert len(err) < 800 and list(tmp_path.iterdir()) == []


def test_running_out_of_memory_is_one_message_with_the_reason(folder, nursery):
    limit = (
        "import resource\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)"
    )
    result = nursery.run(folder, prelude=limit)
    assert result.returncode == 1
    assert "memory" in only_message(result)
    assert not (folder / "dreams" / "dream_sample.png").exists()


def test_a_bug_keeps_its_traceback(folder, monkeypatch):
    def buggy(self, z):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(quest.VAE, "decode", buggy)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        quest.main(["--device", "cpu"])


# Many at once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8])
def test_runs_started_at_one_moment_in_a_fresh_clone_all_succeed(clone, count):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--epochs", "1"]
    env = {**os.environ, **NO_NETWORK, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, cwd=clone, env=env, **pipes) for _ in range(count)]
    ends = [(*process.communicate(timeout=240), process.returncode) for process in runs]
    assert [code for *_, code in ends] == [0] * count, ends
    assert len({out.splitlines()[1] for out, *_ in ends}) == 1  # all trained on the same digits, to the same loss
    assert all("damaged" not in err for _, err, _ in ends)
    assert whole(picture(clone))
    assert contents(clone / "dreams") == {"dream_sample.png", ".lock"}
    assert_data_sound(clone)


def test_a_run_that_must_wait_for_another_says_so_and_can_be_stopped(folder, nursery):
    (folder / "dreams").mkdir()
    with open(folder / "dreams" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = nursery.start(folder)
        process.says("Waiting for another run to be done with ./dreams.")
        process.send(signal.SIGTERM)
        assert process.wait() == 143


# Streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["| head -1", "2>&1 | head -c 1", ">&- 2>&-"])
def test_streams_that_close_early_do_not_stop_the_dream(folder, ending):
    line = f"'{sys.executable}' '{SCRIPT}' --device cpu --epochs 1 {ending}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert whole(picture(folder))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("--device cpu --epochs 1", 1, "standard output cannot be written: No space left on device"),
        (
            "--json --epochs 0",
            2,
            "argument --epochs: '0' is not a whole number from 1 to 1000000 (--help lists the options)",
        ),
    ],
)
def test_standard_output_on_a_full_disk_is_no_traceback(folder, arguments, code, said):
    line = f"'{sys.executable}' '{SCRIPT}' {arguments} > /dev/full"
    result = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, f"quest_12_1.py: {said}\n")


def test_an_ascii_console_without_a_terminal_gets_no_traceback(folder):
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run(folder, "--device", "cpu", "--epochs", "1", **plain)
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).isascii()
    result = run(folder, "--device", "b\N{LATIN SMALL LETTER A WITH DIAERESIS}n", **plain)
    assert result.returncode == 2 and only_message(result).isascii()
