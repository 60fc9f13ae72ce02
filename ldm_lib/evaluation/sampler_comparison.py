"""Compare samplers at several numbers of steps, on the same cases and from the same noise."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

from ldm_lib.data.case import CaseData
from ldm_lib.devices import timed
from ldm_lib.diffusion.samplers import samplers_for
from ldm_lib.evaluation.case_scores import fidelity_row, names
from ldm_lib.inpainting.inpainter import Inpainter


def sampler_rows(
    inpainter: Inpainter,
    cases: Sequence[CaseData],
    *,
    steps: Sequence[int],
    seed: int,
    guidance: float,
    threshold: float,
) -> Iterator[dict[str, Any]]:
    """Inpaint each case once by each sampler that supports the model's schedule, in each number of steps, and score it.

    Numbers of steps above the schedule's are left out.

    Yields:
        rows of "case", "patient", "sampler", "steps", "seconds" (of a result) and the scores of `fidelity_row`.
    """
    possible = sorted({n for n in steps if n <= inpainter.model.schedule.steps})
    for data in cases:
        fill = partial(inpainter, data, latents=inpainter.encode(data), seed=seed, guidance=guidance)
        for sampler, n in product(samplers_for(inpainter.model.schedule), possible):
            seconds, filled = timed(partial(fill, sampler=sampler, num_inference_steps=n), inpainter.model.device)
            row = names(data) | {"sampler": sampler, "steps": n, "seconds": seconds}
            yield row | fidelity_row(data, filled.mean, requested=data, threshold=threshold)
