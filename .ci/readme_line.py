#!/usr/bin/env python3
"""Run one of the two commands of README.md, as it stands there.

python3 .ci/readme_line.py 0    set up and run the main job
python3 .ci/readme_line.py 1    set up and pass the tests
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commands() -> list[str]:
    """The commands in README's blocks of bash, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [block.strip() for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)]


if __name__ == "__main__":
    command = commands()[int(sys.argv[1])]
    print(f"+ {command}", flush=True)
    sys.exit(subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=ROOT).returncode)
