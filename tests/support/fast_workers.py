"""What `make_scan_cohort` may call to draw; a worker process that imports this module registers in half a second."""

import multiprocessing

from ldm_lib.anatomy import affine_alignment, deformation

if multiprocessing.parent_process():  # in a worker, which the fixture `fast_registration` does not reach
    affine_alignment.ITERATIONS, deformation.ITERATIONS = 5, (0, 0, 3)


def draw(path, **planes_kwargs):
    """Write what would be drawn, in place of a picture."""
    path.write_text(f"{planes_kwargs['title']}: {', '.join(planes_kwargs['volumes'])}")
