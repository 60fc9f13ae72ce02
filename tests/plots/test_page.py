"""The page of a case: whole without a network, and a browser shows it."""

import base64
import gzip
import json
import re
from hashlib import sha256

import nibabel as nib
import numpy as np
import pytest
from browser import settled
from scipy.spatial.transform import Rotation

from ldm_lib.__main__ import main
from ldm_lib.data.case import load_case
from ldm_lib.errors import InputError
from ldm_lib.inpainting.inpainter import Inpainter
from ldm_lib.plots import page as pages

FEW = {"num_inference_steps": 2}
AFFINE = np.array([[0, 2, 0, -7], [-1, 0, 0, 5], [0, 0, 3.0, 20], [0, 0, 0, 1]])


@pytest.fixture
def arrays():
    """A brain in air, with a mask of one octant of a ball."""
    x, y, z = np.indices((24, 20, 16)) - np.array([12, 10, 8])[:, None, None, None]
    brain = (x / 10) ** 2 + (y / 8) ** 2 + (z / 6) ** 2 < 1
    mask = (x > 0) & (y > 0) & (z > 0) & (x**2 + y**2 + z**2 < 20)
    truth = np.where(brain, 100.0 + 3 * x + 5 * y - 4 * z, 0)
    return np.where(mask, 0, truth), truth, mask


def held(text):
    return json.loads(re.search('<script type="application/json" id="volumes">(.*?)</script>', text, re.DOTALL)[1])


def unpacked(text):
    return gzip.decompress(base64.b64decode(text))


def test_the_layers_complete_the_scan(arrays):
    """What the page holds gives the true image back, in 8 bits, at its place in the world."""
    voided, truth, mask = arrays
    volumes = held(pages.page(voided, {"truth": truth}, mask, affine=AFFINE))
    scan = nib.Nifti1Image.from_bytes(unpacked(volumes["scan"]))
    stored = np.asarray(scan.dataobj).ravel("F").copy()
    inside = np.frombuffer(unpacked(volumes["inside"]), np.uint8) == 1
    assert not stored[inside].any() and inside.sum() == mask.sum()
    stored[inside] = np.frombuffer(unpacked(volumes["layers"][0]["values"]), np.uint8)
    start = np.rint(np.linalg.inv(AFFINE) @ scan.affine[:, 3])[:3].astype(int)
    box = tuple(slice(a, a + n) for a, n in zip(start, scan.shape, strict=True))
    high = np.percentile(voided[voided > 0], 99.5)
    np.testing.assert_allclose(stored.reshape(scan.shape, order="F"), np.clip(truth[box] / high, 0, 1) * 255, atol=0.51)
    assert np.count_nonzero(truth[box]) == np.count_nonzero(truth)
    centre = np.linalg.inv(AFFINE) @ [*volumes["centre"], 1]
    assert mask[tuple(np.rint(centre[:3]).astype(int))]


def test_names_are_text_and_only_the_pages_own_scripts_run(arrays):
    voided, truth, mask = arrays
    text = pages.page(voided, {"</script><b>": truth}, mask, affine=AFFINE, title="<img src=x>")
    assert "<img" not in text.replace(pages.viewer_script(), "") and held(text)["layers"][0]["name"] == "</script><b>"
    policy = re.search('Content-Security-Policy" content="(.*?)"', text)[1]
    scripts = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digests = {base64.b64encode(sha256(script.encode()).digest()).decode() for script in scripts}
    assert set(re.findall("sha256-([^']+)", policy)) == digests and len(scripts) == 2
    assert policy.startswith("default-src 'none';") and not re.search("script-src[^;]*unsafe|http|connect", policy)


def test_nilearn_carries_a_viewer_that_can_be_inlined():
    script = pages.viewer_script()
    assert len(script) < 3e6 and "</script" not in script and "{{" not in script
    for name in ("loadFromBase64", "setClipPlane", "showAllOrientationMarkers", "multiplanarShowRender"):
        assert name in script


def test_without_the_viewer_the_error_is_one_line(arrays, monkeypatch):
    voided, truth, mask = arrays
    monkeypatch.setattr(pages, "VIEWER", ("absent.js",))
    with pytest.raises(InputError, match=r"^absent\.js: the installed nilearn lacks this file\. Fix: install"):
        pages.page(voided, {"truth": truth}, mask, affine=AFFINE)


def test_the_command_writes_a_page_next_to_each_result(cases, cohort_folder, tiny_model_folder, tmp_path, capsys):
    few = ["--model", str(tiny_model_folder), "--steps", "2", "--device", "cpu", "--samples", "2"]
    files = ["--t1n-voided", str(cases[0].t1n_voided), "--mask", str(cases[0].mask)]
    assert main(["inpaint", *files, "--output", str(tmp_path / "a.nii.gz"), "--page", *few]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "a.html")
    layers = held((tmp_path / "a.html").read_text())["layers"]
    assert [layer["name"] for layer in layers] == ["mean of samples", "one sample"]
    folder = ["inpaint", "--data", str(cohort_folder), "--output", str(tmp_path / "all"), *few[:-2]]
    assert main(folder) == 0 and not list(tmp_path.glob("all/*.html"))
    volumes = {path.name: path.read_bytes() for path in tmp_path.glob("all/*.nii.gz")}
    assert main([*folder, "--page"]) == 0 and len(list(tmp_path.glob("all/*.html"))) == len(cases) == len(volumes)
    assert volumes == {path.name: path.read_bytes() for path in tmp_path.glob("all/*.nii.gz")}
    capsys.readouterr()
    assert main([*folder, "--page"]) == 0 and f"{len(cases)} found" in capsys.readouterr().err


def test_a_page_elsewhere(cases, tiny_model_folder, tmp_path):
    result = Inpainter.load(tiny_model_folder, device="cpu")(load_case(cases[0]), **FEW)
    with pytest.raises(InputError, match=r"a page must end in \.html"):
        result.page(tmp_path / "page.htm")
    names = [layer["name"] for layer in held(result.page(tmp_path / "page.html").read_text())["layers"]]
    assert names == ["result", "ground truth"]


OBLIQUE = np.eye(4)
OBLIQUE[:3] = Rotation.from_euler("xz", [32, 20], degrees=True).as_matrix() @ AFFINE[:3]


@pytest.mark.slow
@pytest.mark.parametrize("affine", [AFFINE, OBLIQUE])
def test_a_browser_shows_the_page_without_a_network(arrays, tmp_path, browser, affine):
    """The canvas shows the mask, slider and layers change it, nothing is asked for, and the console stays empty."""
    voided, truth, mask = arrays
    page, said, asked = tmp_path / "page.html", [], []
    page.write_text(pages.page(voided, {"truth": truth, "half": truth / 2}, mask, affine=affine), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 600, "height": 500})
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.route(re.compile("^(?!file:)"), lambda route: route.abort())
    tab.goto(page.as_uri())
    tab.wait_for_selector("body[data-ready]", timeout=60_000)
    seen = [settled(tab.locator("canvas"))]
    assert len(seen[0]) > 3000  # a blank canvas packs into less
    shown_mm = [int(number) for number in re.findall(r"-?\d+", tab.locator("#place").inner_text())]
    assert np.abs(np.subtract(shown_mm, held(page.read_text())["centre"])).max() <= 3  # the longest edge of a voxel
    for action in (
        lambda: tab.locator("#fade").fill("0.5"),
        lambda: tab.locator("#fade").fill("0"),
        lambda: tab.locator("#outline").uncheck(),
        lambda: tab.locator("#cut").uncheck(),
        lambda: tab.locator("#fade").fill("1"),
        lambda: tab.get_by_label("half").check(),
    ):
        action()
        seen.append(settled(tab.locator("canvas"), unlike=seen[-1]))
    assert len(set(seen)) == len(seen)
    assert asked == [page.as_uri()] and not said
