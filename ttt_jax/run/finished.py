"""Who may write a run folder: one job, and none once the run is finished.

A finished run that is asked for again shows its report, and nothing in its folder changes.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from ttt_jax.config import OPEN_REMAT, Config, to_dict
from ttt_jax.process.failure import failures_in_one_line
from ttt_jax.process.lock import RunLock
from ttt_jax.process.multihost import on_first_process
from ttt_jax.process.signals import StopSignal
from ttt_jax.run.folder import check_run_dir, flatten
from ttt_jax.run.report import REPORT_FILE, print_report

_MAX_BYTES = 64 << 20
_PLACE = ("name", "runs_dir")  # a folder may be moved


@contextlib.contextmanager
def only_writer(config: Config, stop: StopSignal) -> Iterator[RunLock | None]:
    """Hold the lock of `config.run_dir`; None, and no lock, when the run is finished and its report
    has been shown.

    All processes together. A signal that ends the process gives the lock back; a failure of the
    machine is one line, and leaves its traceback in the folder.

    Raises: UserError, one line: another job holds the folder.
    """
    import jax

    main = jax.process_index() == 0
    if on_first_process(lambda: show_if_finished(config)):
        yield None
        return
    with RunLock(config.run_dir, main) as lock:
        stop.before_leaving.append(lock.release)
        if on_first_process(lambda: show_if_finished(config)):
            yield None  # finished by the process that had the lock until now
            return
        if main and (remark := _finished_report(config)[1]):
            print(remark, flush=True)
        with failures_in_one_line(config.run_dir if main else None):
            yield lock


def show_if_finished(config: Config) -> bool:
    """Print the report of a finished run, and which settings have no effect on it; whether it is
    one. Writes nothing.

    A run is finished when its `report.json`, which is written last, is readable and has the steps
    that are asked for.

    Raises: CheckpointError, one line: the folder holds another run or other files.
    """
    if not check_run_dir(config):
        return False
    report, _ = _finished_report(config)
    if report is None:
        return False
    done = f"finished ({report['steps']} steps); nothing is done, nothing in it changes"
    print(f"run folder {config.run_dir}: {done}", flush=True)
    if other := _without_effect(config, report):
        print(
            f"without effect on a finished run: {', '.join(other)}; for another closing "
            "evaluation delete "
            f"{config.run_dir / REPORT_FILE} and run the same command again",
            flush=True,
        )
    print_report(report, config.run_dir)
    return True


def _finished_report(config: Config) -> tuple[dict[str, Any] | None, str]:
    """Read the report of a run that has the steps that are asked for.

    Returns: the report, or None and what to say of the one that is there: it has fewer steps, or is
      damaged, which is no report: the closing evaluation makes it again.
    """
    path = config.run_dir / REPORT_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None, ""
        report = json.loads(path.read_text(encoding="utf-8"))
        print_report(report, config.run_dir, Console(file=io.StringIO()))
        if not isinstance(report["steps"], int):
            return None, ""
    except FileNotFoundError:
        return None, ""
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        return None, (
            f"warning: {path}: not readable ({type(error).__name__}); the closing evaluation is "
            "done again"
        )
    if report["steps"] < config.steps:
        return None, (
            f"run folder {config.run_dir}: was finished with {report['steps']} steps and goes on "
            f"to {config.steps}; the report is then made anew"
        )
    return report, ""


def _without_effect(config: Config, report: dict[str, Any]) -> list[str]:
    """List the settings that differ from those of the report, as `field = value (was value)`."""
    before, now = flatten(report["config"]), flatten(json.loads(json.dumps(to_dict(config))))
    if config.remat_save == OPEN_REMAT:  # the run's own choice is what it found
        del now["remat_save"]
    differ = [
        field
        for field in now
        if field in before and before[field] != now[field] and field not in _PLACE
    ]
    if report["steps"] > config.steps and "steps" not in differ:
        differ.append("steps")
        before["steps"] = report["steps"]
    return [
        f"{field} = {json.dumps(now[field])} (was {json.dumps(before[field])})" for field in differ
    ]
