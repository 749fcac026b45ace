"""The whole job on a second device, "far", which stands in for a GPU: PyTorch's PrivateUse1, written here in Python.

The CPU computes for it, so all results must be the CPU's, byte for byte. But as on a GPU, tensors of both do not mix,
and each crossing between them is noticed. Of a GPU's speed, memory and rounding it says nothing.
"""

import traceback

import pytest
import torch
from harness import GPUS, SCRIPT, run_small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

pytestmark = pytest.mark.skipif(GPUS > 0, reason="a process that uses PrivateUse1 cannot run backward on a CUDA GPU")
REGISTER = "from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register\n"
PRELUDE = REGISTER + "from test_second_device import Far; register('far'); Far().__enter__()\n"  # in the forked process


class FarTensor(torch.Tensor):
    __torch_dispatch__ = None  # `Far` does its work

    def __new__(cls, near):
        tensor = cls._make_wrapper_subclass(cls, near.shape, near.stride(), dtype=near.dtype, device="far:0")
        tensor.near = near  # its numbers, as a tensor of the CPU
        return tensor

    def numpy(self, *, force):  # without force=True an error, as on a GPU
        return self.cpu().numpy()

    def tolist(self):  # PyTorch's own refuses a tensor written in Python
        return self.cpu().tolist()


class Far(TorchDispatchMode):
    """Does each operation. A crossing prints which function of the script reads the far side, or writes to it."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        leaves, structure = tree_flatten((arguments, named or {}))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # As on a GPU, a tensor of the CPU may take part if it is one number.
        sides = {tensor.device.type for tensor in tensors if tensor.is_far or tensor.dim()}
        assert len(sides) < 2, "tensors on two devices"
        arguments, named = tree_unflatten([getattr(leaf, "near", leaf) for leaf in leaves], structure)
        side = torch.device(named.pop("device", None) or max(sides, default="cpu")).type  # the result's: "far" > "cpu"
        goal = "cpu" if torch.Tag.data_dependent_output in operation.tags else side  # .item() gives Python a number
        if {tensor.device.type for tensor in tensors} - {goal}:
            calls = [call.name for call in traceback.extract_stack() if call.filename == str(SCRIPT)]
            print([name for name in calls if name[0] != "<"][-1], "reads" if goal == "cpu" else "writes")
        result = operation(*arguments, **named)
        return tree_map_only(torch.Tensor, FarTensor, result) if side == "far" else result


def test_a_second_device_gives_the_same_files_training_waits_once_an_epoch_and_no_tensors_mix(folder):
    near = run_small(folder, "--gallery", "--epochs", "2", "--output", "near")
    far = run_small(folder, "--gallery", "--epochs", "2", "--output", "far", "--device", "far:0", prelude=PRELUDE)
    assert (near.returncode, far.returncode) == (0, 0), near.stderr + far.stderr
    for name in "sample.png canvas.png codes.png mirror.png growth.gif model.pt".split():
        assert (folder / f"near/dream_{name}").read_bytes() == (folder / f"far/dream_{name}").read_bytes(), name
    assert all(weight.is_cpu for weight in torch.load(folder / "far/dream_model.pt").values())  # no map_location
    weights, frames = 2 * 5, 1 + 2  # matrix and bias of five layers; before training and after each epoch
    setup = ["open_device reads"] + 2 * ["images_on writes"] + (weights + 2) * ["learn writes"]  # z and eps
    epoch = ["train_epoch reads", "evaluate reads"]  # loss, held-out loss
    end = (1 + 2 * weights + 1) * ["run_job reads"] + frames * ["save_pictures reads"]  # gradients too, x_test
    assert far.stdout.splitlines()[:-1] == setup + 2 * epoch + end  # the last line is the message
    mixed = run_small(folder, prelude=PRELUDE + "torch.zeros(2, device='far:0') + torch.zeros(2)")
    assert mixed.returncode == 1 and "tensors on two devices" in mixed.stderr
