"""Pictures of what a browser shows."""

import time

SECONDS = 30  # for a picture to change and come to rest: WebGL is drawn by the CPU in tests


def settled(element, unlike=b""):
    """The screenshot of an element once two in a row are equal and differ from an earlier one."""
    end, last = time.monotonic() + SECONDS, b""
    while time.monotonic() < end:
        element.page.wait_for_timeout(300)
        picture = element.screenshot()
        if picture == last != unlike:
            return picture
        last = picture
    raise AssertionError("the picture did not change" if last == unlike else "the picture did not come to rest")
