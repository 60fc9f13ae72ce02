"""Options of reading images."""

from importlib.util import find_spec

from pydantic import Field, field_validator

from ldm_lib.errors import ConfigError
from ldm_lib.options import Options, Orientation, SomeIntegers, integers


class ReadOptions(Options):
    """Relax input validation: what would be rejected is read in the way that is stated here."""

    hint = "see `help(ldm.ReadOptions)`"

    heading = "Reading"
    assume_orientation: Orientation = Field(
        "", description="orientation of the files, such as LPS, where headers state none or a wrong one"
    )
    nan_as_zero: bool = Field(False, description="read NaN voxels as 0, in images, maps and masks")
    mask_labels: SomeIntegers = Field("", description="labels to inpaint, where masks are segmentations, such as 1,2,4")
    resample_mask: bool = Field(False, description="resample masks on another grid, by nearest neighbour")
    skull_strip: bool = Field(False, description="make the brain masks that whole heads lack, with the package deepbet")
    scrub_header: bool = Field(False, description="drop free text and extensions from the headers of results")

    @field_validator("skull_strip")
    @classmethod
    def _is_installed(cls, wanted: bool) -> bool:
        if wanted and not find_spec("deepbet"):
            raise ConfigError("the package deepbet, which finds brains, is not installed", where="skull_strip",
                              fix="pip install 'brain-mri-inpainting[whole-head]'")  # fmt: skip
        return wanted

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of `mask_labels`; empty if masks are binary."""
        return integers(self.mask_labels) if self.mask_labels else ()


READ_STRICTLY = ReadOptions()
