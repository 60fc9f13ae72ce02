"""Run commands in a process of its own, and list what is heavy of what they have loaded."""

import json
import subprocess
import sys
from collections.abc import Sequence

LOADED = """
import json, sys
from ldm_lib.__main__ import main
heavy = "torch monai lightning papermill nilearn dipy mlflow wandb pandas matplotlib IPython nbconvert trackio".split()
for words in map(json.loads, sys.argv[1:]):
    try:
        main(words)
    except SystemExit:
        pass
    print("LOADED", json.dumps(sorted(set(heavy) & set(sys.modules))))
"""


def heavy_imports(commands: Sequence[Sequence[str]]) -> tuple[str, list[list[str]]]:
    """Return the standard output, and after each command all heavy packages that the process has loaded by then."""
    done = subprocess.run([sys.executable, "-c", LOADED, *map(json.dumps, commands)],
                          capture_output=True, text=True, check=True)  # fmt: skip
    loaded = [json.loads(line.removeprefix("LOADED ")) for line in done.stdout.splitlines() if line[:7] == "LOADED "]
    assert len(loaded) == len(commands), done.stderr
    return done.stdout, loaded
