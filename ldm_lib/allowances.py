"""What a user may let pass that the gate would refuse, and how it is read then."""

from dataclasses import dataclass

from ldm_lib.values import integers


@dataclass(frozen=True)
class Allowances:
    """By default nothing is let pass.

    Attributes:
        assume_orientation: three letters such as "LPS": the directions in which the voxel axes of a file grow that does
            not say so itself; its voxel sizes are then those of its pixdim, its centre the world's.
        nan_as_zero: voxels of an image or map that are not a number are read as 0.
        mask_labels: the labels of a segmentation that together are the mask; none means a mask of 0 and 1.
        scrub_header: outputs carry neither the free text nor the extensions of their source's header.
    """

    assume_orientation: str = ""
    nan_as_zero: bool = False
    mask_labels: tuple[int, ...] = ()
    scrub_header: bool = False

    @classmethod
    def of(cls, *, assume_orientation: str = "", nan_as_zero: bool = False, mask_labels: str = "") -> "Allowances":
        """From the parameters of notebook 01: `mask_labels` as text, "1,2,4"."""
        return cls(assume_orientation, nan_as_zero, integers(mask_labels) if mask_labels else ())


NOTHING = Allowances()
