#!/usr/bin/env python3
"""Run the jobs of .github/workflows/ci.yml on this machine, step by step as the file has them.

    python .ci/workflow.py                       every job, with every version of its matrix
    python .ci/workflow.py site readme=3.12      one job; one version of a job
    python .ci/workflow.py --list                what would be run
    python .ci/workflow.py --python 3.12=/opt/py312/bin/python3.12 pinned=3.12

A job gets a clone of HEAD and a fresh virtual environment first on its PATH, as setup-python gives
it a Python. What an action does that is not known here ends the script, so that nothing is skipped
silently. The exit code is that of the first step that fails. Needs PyYAML.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def jobs(text: str) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """The jobs of a workflow: (name, version of Python, [(kind, argument)]), one for each entry of
    a matrix. Kinds are "checkout", "python", "run" and "keep".

    Raises: ValueError for an action that is not known here.
    """
    found = []
    for name, job in yaml.safe_load(text)["jobs"].items():
        for python in job.get("strategy", {}).get("matrix", {}).get("python", [""]):
            fill = lambda value, python=python: re.sub(
                r"\$\{\{ *matrix\.python *\}\}", python, str(value)
            )
            steps = []
            for step in job["steps"]:
                action = step.get("uses", "").partition("@")[0]
                if "run" in step:
                    steps.append(("run", fill(step["run"])))
                elif action == "actions/checkout":
                    steps.append(("checkout", ""))
                elif action == "actions/setup-python":
                    steps.append(("python", fill(step["with"]["python-version"])))
                elif action == "actions/upload-artifact":
                    steps.append(("keep", step["with"]["path"]))
                else:
                    raise ValueError(f"job {name}: {step} is not known to {Path(__file__).name}")
            version = next((argument for kind, argument in steps if kind == "python"), "")
            found.append((name, version, steps))
    return found


def run(steps: list[tuple[str, str]], pythons: dict[str, str], work: Path) -> int:
    """Run the steps of a job in `work`, an empty folder; returns the exit code."""
    tree, env = work / "tree", {**os.environ}
    for kind, argument in steps:
        print(f"--- {kind} {argument}", flush=True)
        begin, code = time.monotonic(), 0
        if kind == "checkout":
            subprocess.run(["git", "clone", "-q", ROOT, tree], check=True)
        elif kind == "python":
            python = pythons.get(argument) or shutil.which(f"python{argument}")
            if python is None:
                sys.exit(f"error: no python{argument}; name it with --python {argument}=PATH")
            subprocess.run([python, "-m", "venv", work / "python"], check=True)
            env["PATH"] = f"{work / 'python' / 'bin'}{os.pathsep}{env['PATH']}"
        elif kind == "run":
            command = ["bash", "-e", "-o", "pipefail", "-c", argument]
            code = subprocess.run(command, cwd=tree, env=env).returncode
        else:
            code = 0 if (tree / argument).exists() else 1
        print(f"--- exit code {code}, {time.monotonic() - begin:.0f} s", flush=True)
        if code:
            return code
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("jobs", nargs="*", help="JOB or JOB=VERSION")
    parser.add_argument("--python", action="append", default=[], help="VERSION=PATH")
    parser.add_argument("--list", action="store_true")
    words = parser.parse_args()
    pythons = dict(word.split("=", 1) for word in words.python)
    known = jobs(WORKFLOW.read_text(encoding="utf-8"))
    wanted = [j for j in known if not words.jobs or {j[0], f"{j[0]}={j[1]}"} & {*words.jobs}]
    for name, version, steps in wanted:
        print(f"=== {name}, Python {version}", flush=True)
        if words.list:
            print(*(f"    {kind} {argument}" for kind, argument in steps), sep="\n")
            continue
        with tempfile.TemporaryDirectory() as work:
            if code := run(steps, pythons, Path(work)):
                return code
    return 0 if wanted else 2


if __name__ == "__main__":
    sys.exit(main())
