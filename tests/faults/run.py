"""The fault harness: `python tests/faults/run.py [--only NAME ...] [--kills 50] [--signals 10]
[--instants 200] [--keep]`.

Trains a tiny model, breaks it in every way of `scenarios.py`, continues it, and compares with the
undisturbed run. Prints a table (Markdown); exit code 1 if a promise was broken.
`disk_full` and `disk_full_of_two` need the right to mount a tmpfs. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from faults import scenarios  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (
        "kill_9",
        "sigterm",
        "disk_full",
        "corrupt",
        "truncated_data",
        "not_finite",
        "one_of_two",
        "sigterm_of_two",
        "disk_full_of_two",
        "shared_cache",
        "two_jobs",
        "interrupted_twice",
        "lost_terminal",
        "signals_anywhere",
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=10)
    parser.add_argument("--instants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the runs behind and print where")
    args = parser.parse_args()
    trials = {"kill_9": args.kills, "sigterm": args.signals, "signals_anywhere": args.instants}
    folder, rows = Path(tempfile.mkdtemp(prefix="faults-")), []
    for name in args.only:
        begin = time.monotonic()
        scenario = getattr(scenarios, name)
        try:
            seen, verdict = scenario(folder, *([trials[name]] if name in trials else [])), "held"
        except Exception as error:
            traceback.print_exc()
            seen, verdict = " ".join(str(error).split())[:300] or type(error).__name__, "BROKEN"
        rows.append((name, seen, verdict, f"{time.monotonic() - begin:.0f} s"))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print("| fault | seen | promise | time |\n|---|---|---|---:|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if args.keep:
        print(f"\nruns: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(row[2] != "held" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
