"""Run `ldm` in a process of its own, and write where its seconds went.

The functions of a part are wrapped; the time that a function spends in a function of another part counts for the latter
alone, so that all parts and "other" add up to the whole. Nothing of the library is imported before the clock runs.

    BENCH_STARTED=$(date +%s) python -m benchmarks.timed_command TIMES.json inpaint --t1n-voided V --mask M --output O
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

STARTED = "BENCH_STARTED"  # environment variable: when the process was started, seconds of the epoch
PARTS = {  # part -> functions, "module:name" or "module:class.name"
    "read and check": ("data.case:case_of_files", "data.case:load_case"),
    "load the model": ("inpainting.inpainter:Inpainter.load",),
    "registration": ("inpainting.tissue_maps:add_tissue_map",),
    "initial estimate": ("anatomy.initial_estimate:initial_estimate", "anatomy.contralateral:contralateral_image"),
    "encode": ("inpainting.inpainter:Inpainter.encode",),
    "sampling steps": ("diffusion.model:LatentDiffusion.sample",),
    "decode": ("autoencoder.region_decoding:decode_box",),
    "edge": ("inpainting.preprocess:CaseGrid.values",),
    "write": ("inpainting.result:Inpainting.save",),
}


class Stopwatch:
    """Add up the seconds of parts; time within an inner part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._since, self._inside = time.perf_counter(), ["other"]

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block for a part."""
        self._switch()
        self._inside.append(name)
        try:
            yield
        finally:
            self._switch()
            self._inside.pop()

    def wrap(self, name: str, place: str) -> None:
        """Count the time of a function for a part, wherever it was imported."""
        module, _, attribute = place.partition(":")
        owner: Any = import_module(f"ldm_lib.{module}")
        *classes, attribute = attribute.split(".")
        for each in classes:
            owner = getattr(owner, each)
        function = vars(owner)[attribute]
        bound = isinstance(function, classmethod)
        timed = self._timed(name, function.__func__ if bound else function)
        holders = [owner] if classes else [m for m in sys.modules.values() if getattr(m, attribute, None) is function]
        for holder in holders:
            setattr(holder, attribute, classmethod(timed) if bound else timed)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return timed


def main(arguments: Sequence[str]) -> int:
    """Run a command with its parts timed, and write their seconds to a file."""
    start = time.time() - float(os.environ[STARTED])
    watch = Stopwatch()
    with watch.part("imports"):
        from ldm_lib.__main__ import main as ldm

        for module in ("ldm_lib.cli.case_commands", "ldm_lib.inpainting.single_file", "ldm_lib.inpainting.folder"):
            import_module(module)
        for part, places in PARTS.items():
            for place in places:
                watch.wrap(part, place)
    with watch.part("other"):
        status = ldm(arguments[1:])
    Path(arguments[0]).write_text(json.dumps({"start": start, **watch.seconds}))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
