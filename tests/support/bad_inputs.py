"""The catalogue of bad inputs: how each is made from a good case, and what input validation must do and say.

A row says what `validate` must do, and `filled` what inpainting must where that differs: inpainting reads neither the
full image nor the parts of the mask. What a row's case must be read as stands in the `x`, `m` and `A` of its `Place`.
"""

from pathlib import Path

from bad_files import DAMAGED, HEADERS, PLACES
from bad_places import Place, Row
from bad_volumes import GRIDS, VALUES

ROWS: dict[str, Row] = DAMAGED | PLACES | HEADERS | GRIDS | VALUES


def spoilt(name: str, root: Path, identity: str = "BraTS-GLI-00001-000") -> Place:
    """The case of a row, written to `<root>/<identity>`."""
    place = Place(root, identity, complete=ROWS[name].complete)
    ROWS[name].build(place)
    return place
