"""The locked set: all that is needed, nothing that is not hashed, and no word of where it was made."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
HEAD, _, BODY = LOCK.partition("--only-binary :all:\n\n")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
ENTRY = re.compile(r"([a-z0-9][a-z0-9.-]*)==([\w.!]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
LOCKED = {canonicalize_name(name): Version(version) for name, version, _ in ENTRY.findall(BODY)}
TARGET = default_environment() | {
    "python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "platform_system": "Linux",
    "platform_machine": "x86_64", "os_name": "posix", "implementation_name": "cpython",
    "platform_python_implementation": "CPython", "extra": "",
}  # fmt: skip


def test_it_is_pins_with_hashes_and_nothing_else():
    """No index, address or path can be in it: each line below the head has one of two forms."""
    assert "".join(match.group() for match in ENTRY.finditer(BODY)) == BODY
    assert len(LOCKED) == len(ENTRY.findall(BODY)) > 150, "a package twice"


def test_its_head_says_for_what_and_how_and_not_where():
    lines = HEAD.splitlines()
    assert len(lines) > 3 and all(line.startswith("# ") for line in lines)
    assert "Linux x86-64" in HEAD and "CPython 3.11" in HEAD and "make lock" in HEAD and "make setup LOCKED=1" in HEAD
    assert "pip install --require-hashes -r requirements.lock" in HEAD and "torch is the build on PyPI" in HEAD
    assert "://" not in LOCK and not re.search(r"(?<![\w*])[/~]\w", HEAD)


def test_every_dependency_is_pinned_where_its_range_allows():
    allowed = {r.name: r.specifier.contains(LOCKED[canonicalize_name(r.name)]) for r in ASKED}
    assert all(allowed.values()), allowed
    assert not [name for name, version in LOCKED.items() if version.local or version.is_devrelease]


def test_what_the_packages_need_is_locked_too():
    """Or pip would refuse to install it: asked of the packages that are installed here in the locked version."""
    asked, looked_at = {}, 0
    for name, version in LOCKED.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if Version(Version(found.version).public) == version:
            looked_at += 1
            needs = map(Requirement, found.requires or ())
            asked |= {canonicalize_name(r.name): name for r in needs if not r.marker or r.marker.evaluate(TARGET)}
    assert not asked.keys() - LOCKED.keys()
    assert looked_at > 20


def test_the_compromised_releases_of_lightning_are_refused():
    (lightning,) = (requirement for requirement in ASKED if requirement.name == "lightning")
    assert not any(lightning.specifier.contains(bad) for bad in ("2.6.2", "2.6.3"))
    assert LOCKED["lightning"] == LOCKED["pytorch-lightning"] >= Version("2.6.6")


def test_the_floors_that_security_asks_for():
    floors = {"lightning": "2.6.6", "monai": "1.6.1", "jupyterlab": "4.2.5"}
    for requirement in ASKED:
        if floor := floors.pop(requirement.name, None):
            assert not requirement.specifier.contains(f"{floor}rc1", prereleases=True)
            assert requirement.specifier.contains(floor)
    assert not floors
