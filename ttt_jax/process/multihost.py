"""Starts a job of several processes, one per host (or per GPU). Called once, before jax looks at
its devices.

Where the processes are comes from the environment, first match:

    set by hand, on any machines:
        TTT_JAX_COORDINATOR=HOST:PORT TTT_JAX_NUM_PROCESSES=N TTT_JAX_PROCESS_ID=I
    found by jax itself:
        SLURM with several tasks, Open MPI, TPU pods (GCE, GKE)

Otherwise the job has one process. `TTT_JAX_TIMEOUT` is the number of seconds to wait for the other
hosts (default 300).
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ttt_jax import jax_internals
from ttt_jax.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError

NAMES = ("TTT_JAX_COORDINATOR", "TTT_JAX_NUM_PROCESSES", "TTT_JAX_PROCESS_ID")
_TIMEOUT = "TTT_JAX_TIMEOUT"


def initialize(environment: Mapping[str, str] | None = None) -> bool:
    """Join the other processes of this job, if there are any.

    Returns: whether there are.

    Raises:
      ConfigError: a variable is missing or malformed.
      TrainingError: one line; a host did not come in time, or the coordinator cannot be reached.
    """
    env = os.environ if environment is None else environment
    explicit = read_explicit(env)
    if explicit is None and not _is_cluster(env):
        return False
    timeout = _number(env, _TIMEOUT, 1) if env.get(_TIMEOUT) else 300

    import jax

    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if explicit is None:
        where, options = "the processes of this job", {}
    else:
        address, count, index = explicit
        where = f"{count} processes through {address} (this is process {index})"
        options = {"coordinator_address": address, "num_processes": count, "process_id": index}
    # It would take over SIGTERM, behind the back of Python's handlers, and the job would train on
    # until it is killed.
    jax.config.update("jax_enable_preemption_service", False)
    # jax's client ends the whole process, with a stack trace, when the coordinator never answers;
    # so the line comes first.
    hint = (
        f"not all of {where} came within {timeout} s; start every host with the same coordinator "
        "and number of processes, "
        f"check that its port is open, or raise {_TIMEOUT}"
    )
    watch = threading.Timer(timeout + 5, _give_up, [hint])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(initialization_timeout=timeout, **options)
    # jax raises RuntimeError, ValueError and its own, by the stage that fails
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        raise TrainingError(f"{hint} ({reason})") from None
    finally:
        watch.cancel()
    return jax.process_count() > 1


def any_process(flag: bool) -> bool:
    """Ask whether the flag is set on some process: the same answer on all of them. Waits for the
    slowest.
    """
    import jax

    if jax.process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.asarray(multihost_utils.process_allgather(np.asarray(flag))).any())


def from_first_process(value: Any) -> Any:
    """Send process 0's value (what JSON can hold), on all processes. Waits for the slowest; one
    process gets `value` itself.
    """
    # Without jax in the process there is no multi-process run; asking jax would initialise its
    # backends.
    if "jax" not in sys.modules or sys.modules["jax"].process_count() == 1:
        return value
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).decode())


def on_first_process(function: Callable[[], Any]) -> Any:
    """Call the function on process 0; all get its value (what JSON can hold), or all raise its
    UserError.

    Waits for the slowest; one process alone just calls it.
    """
    if "jax" not in sys.modules or sys.modules["jax"].process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if sys.modules["jax"].process_index() == 0:
        try:
            answer["value"] = function()
        except UserError as error:
            answer |= {"error": str(error)[:2000], "kind": type(error).__name__}
    answer = from_first_process(answer)
    if "error" in answer:
        kinds = {
            kind.__name__: kind for kind in (CheckpointError, ConfigError, DataError, TrainingError)
        }
        raise kinds.get(answer["kind"], UserError)(answer["error"])
    return answer["value"]


def say_on_first_process(lines: Sequence[str]) -> None:
    """Print lines once, however many processes there are."""
    if lines and ("jax" not in sys.modules or sys.modules["jax"].process_index() == 0):
        print(*lines, sep="\n", flush=True)


def from_all_processes(value: Any) -> list[Any]:
    """Collect every process' value (what JSON can hold), in their order, on all processes. Waits
    for the slowest.
    """
    import jax

    if jax.process_count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).reshape(-1)
    buffer = np.zeros(int(sizes.max()), np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer))
    return [json.loads(bytes(row[:size]).decode()) for row, size in zip(rows, sizes, strict=True)]


def read_explicit(env: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Read (coordinator, number of processes, this one's index) from the TTT_JAX_ variables; None
    if none is set.

    Raises: ConfigError when only some are set, or one is malformed.
    """
    given = [name for name in NAMES if env.get(name)]
    if not given:
        return None
    if missing := [name for name in NAMES if not env.get(name)]:
        raise ConfigError(
            f"environment variable {missing[0]}: missing; set all of {', '.join(NAMES)}, or none"
        )
    address = env[NAMES[0]]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"environment variable {NAMES[0]} = {address}: write HOST:PORT, the same on all hosts"
        )
    count, index = _number(env, NAMES[1], 1), _number(env, NAMES[2], 0)
    if index >= count:
        raise ConfigError(
            f"environment variable {NAMES[2]} = {index}: must be from 0 to {NAMES[1]} - 1 = "
            f"{count - 1}"
        )
    return address, count, index


def _number(env: Mapping[str, str], name: str, least: int) -> int:
    text = env.get(name, "")
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"environment variable {name} = {text}: must be a whole number from {least}"
        )
    return int(text)


def _is_cluster(env: Mapping[str, str]) -> bool:
    """Say whether jax will find several processes. On other machines its detection is left alone:
    it may ask the network.
    """
    for count in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        # SLURM sets the first in an allocation's shell, too; a task that srun has started knows its
        # step.
        started = count != "SLURM_NTASKS" or "SLURM_STEP_NODELIST" in env
        if started and env.get(count, "1").isdecimal() and int(env.get(count, "1")) > 1:
            return True
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = env.get("MEGASCALE_NUM_SLICES", "1")
    if len(hosts) > 1 or (slices.isdecimal() and int(slices) > 1):
        return True
    return jax_internals.in_cloud_tpu_vm()


def _give_up(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(1)
