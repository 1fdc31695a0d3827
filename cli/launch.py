"""`segdeformer train --nproc N`: N processes on this machine, by torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

from segdeformer.cli.stopping import answered_signals
from segdeformer.cores import num_cores
from segdeformer.errors import UsageError, UserError
from segdeformer.runtime.command import own_command, own_environment

SAVING_S = 120  # that processes have after a signal to finish a step and save; older PyTorch always gives 30


def launch(nproc: int, arguments: Sequence[str], *, max_restarts: int) -> None:
    """Run `segdeformer ARGUMENTS` in `nproc` processes and wait for them.

    Each says its own errors. Raises `UserError` if one was killed without a word, and `SystemExit` with the
    exit code of one that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if sys.platform == "win32":
        raise UsageError("--nproc needs Linux or macOS; on Windows start one process")
    # Threads of one process must not take the cores of the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // nproc)))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # our processes speak for themselves
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
    os.environ.update(own_environment())  # the launcher hands it on
    command = [*own_command(), *arguments]
    try:
        with tempfile.TemporaryDirectory(prefix="segdeformer-") as folder:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=nproc,
                run_id="segdeformer",
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                rdzv_configs={"timeout": 60},
                max_restarts=max_restarts,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=folder),  # it leaves folders there
                signals_to_handle=",".join(number.name for number in answered_signals()),
            )
            elastic_launch(config, command[0])(*command[1:])
    except SignalException:
        sys.exit(1)  # the processes have said that they stopped
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise UserError(
                f"process {rank + 1} of {nproc} was killed by {name}"
                f"{' (often by the system, when memory runs out)' if name == 'SIGKILL' else ''}; "
                "go on from the last checkpoint with --resume, or let --max-restarts do so"
            ) from None
        sys.exit(failure.exitcode)
