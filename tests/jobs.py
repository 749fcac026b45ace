"""What a process does in place of a program: functions for run_job(folder, ...).

This module does not import the script, so that a process can look at what that does.
"""

import json
import signal
import socket
import sys
import warnings

import faults
import torch


def state_of_process():
    """What a program may leave behind in its process."""
    return {
        "seed": torch.get_rng_state().tolist(),
        "denormals": (torch.full((1,), 1e-40) * torch.ones(1)).item() > 0,
        "SIGINT": str(signal.getsignal(signal.SIGINT)),
        "socket timeout": socket.getdefaulttimeout(),
        "default device": str(torch.get_default_device()),
        "default type": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision of products": [
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.matmul.fp32_precision,
        ],
        "filters of warnings": [str(filter) for filter in warnings.filters],
        "CUDA begun": torch.cuda.is_initialized(),
    }


def import_learn_and_run_main():
    """Print the state at first, after the import, after learn and after main."""
    states = [state_of_process()]
    import quest_12_1 as quest

    states.append(state_of_process())
    quest.learn(torch.rand(9, quest.PIXELS), torch.rand(9, quest.PIXELS))
    states.append(state_of_process())
    assert quest.main(["--device", "cpu", "--epochs", "1", "--json"]) == 0
    states.append(state_of_process())
    print(json.dumps(states))


def import_alone():
    """Import the script: no network, no data, and an argument that it has not."""
    sys.argv = ["cell.py", "--nonsense"]
    faults.no_network()
    faults.no_data()
    import quest_12_1  # noqa: F401
