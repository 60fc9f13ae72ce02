"""Write a case as one HTML file that a browser shows without a network: three planes, a 3D rendering and a slider.

The viewer is NiiVue (BSD 2-clause), whose script nilearn carries. It and the volumes are part of the page. The page's
content security policy allows no other script and no connection.
"""

import base64
import gzip
import html
import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from ldm_lib.files import package_file
from ldm_lib.geometry import bounding_box, cropped_affine
from ldm_lib.images.nifti import new_file
from ldm_lib.plots.slices import intensity_window, mask_centre

POLICY = (
    "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
)
VIEWER = ("_assets", "js", "niivue.umd.js")  # in nilearn


def page(
    voided: np.ndarray, layers: Mapping[str, np.ndarray], mask: np.ndarray, *, affine: np.ndarray, title: str = ""
) -> str:
    """Return an HTML page of a voided image over which one of several layers is faded in and out.

    All share one window, that of figures, and are stored in 8 bits: the image cropped to what is not 0, and of the
    layers the voxels of the mask.

    Args:
        voided: (x, y, z), 0 under the mask.
        layers: name to (x, y, z), equal to `voided` outside the mask; the first is shown first.
        mask: bool (x, y, z), outlined.
        affine: (4, 4) voxel indices to millimetres, RAS+ world.
        title: usually the case id.

    Raises:
        InputError: the mask is empty, or nilearn lacks the viewer.
    """
    script = viewer_script()
    head = bounding_box((voided > 0) | mask, 1)
    _, high = intensity_window(voided)
    images = {"scan": _bytes(voided, high), "rim": 255 * (ndimage.binary_dilation(mask) & ~mask).astype(np.uint8)}
    volumes: dict[str, Any] = {
        name: _packed(new_file(image[head], cropped_affine(affine, head))) for name, image in images.items()
    }
    inside = mask[head].ravel("F")
    values = {name: _bytes(volume[head].ravel("F")[inside], high) for name, volume in layers.items()}
    volumes["inside"] = _packed(inside.tobytes())
    volumes["layers"] = [{"name": name, "values": _packed(each.tobytes())} for name, each in values.items()]
    centre = (affine @ [*mask_centre(mask), 1])[:3]
    volumes |= {"centre": centre.tolist(), "depth": _depth(affine, head, centre)}
    text = Path(__file__).with_suffix(".html").read_text()
    for name, value in (("title", html.escape(title)), ("volumes", _inline(volumes)), ("viewer", script)):
        text = text.replace("{{" + name + "}}", value)
    scripts = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    allowed = [base64.b64encode(sha256(each.encode()).digest()).decode() for each in scripts]
    return text.replace("{{policy}}", POLICY.format(" ".join(f"'sha256-{digest}'" for digest in allowed)), 1)


def viewer_script() -> str:
    """Return the script of NiiVue; InputError if the installed nilearn lacks it."""
    return package_file("nilearn", *VIEWER).read_text()


def _bytes(volume: np.ndarray, high: float) -> np.ndarray:
    return np.rint(np.clip(volume / high, 0, 1) * 255).astype(np.uint8)


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _depth(affine: np.ndarray, head: tuple, centre: np.ndarray) -> float:
    """Return where a horizontal cut through the centre lies, as a fraction of the head's height from its middle."""
    corners = np.array([[span.start, span.stop] for span in head])
    heights = [affine[2, 3] + affine[2, :3] @ corner for corner in np.stack(np.meshgrid(*corners), -1).reshape(-1, 3)]
    low, high = min(heights), max(heights)
    return float((centre[2] - (low + high) / 2) / (high - low))


def _inline(content: Any) -> str:
    """Return JSON that no name in it can end early."""
    return json.dumps(content).replace("<", "\\u003c")
