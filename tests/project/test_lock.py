"""The lock file holds all that is needed, with hashes, and nothing about the machine that made it."""

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
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
ENTRY = re.compile(r"([a-z0-9][a-z0-9.-]*)==([\w.!]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")
LOCKED = {canonicalize_name(name): Version(version) for name, version, _ in ENTRY.findall(BODY)}
TARGET = default_environment() | {
    "python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "platform_system": "Linux",
    "platform_machine": "x86_64", "os_name": "posix", "implementation_name": "cpython",
    "platform_python_implementation": "CPython", "extra": "",
}  # fmt: skip


def test_the_lock_holds_pins_with_hashes_only():
    """It holds no index, address or path: each line below the head has one of two forms."""
    assert "".join(match.group() for match in ENTRY.finditer(BODY)) == BODY
    assert len(LOCKED) == len(ENTRY.findall(BODY)) > 150, "a package twice"


def test_its_head_names_platform_and_usage():
    lines = HEAD.splitlines()
    assert len(lines) > 3 and all(line.startswith("# ") for line in lines)
    assert "Linux x86-64" in HEAD and "CPython 3.11" in HEAD and "make lock" in HEAD and "make setup LOCKED=1" in HEAD
    assert "pip install --require-hashes -r requirements.lock" in HEAD and "torch is the build on PyPI" in HEAD
    assert "://" not in LOCK and not re.search(r"(?<![\w*])[/~]\w", HEAD)


def test_every_dependency_is_pinned_within_its_range():
    allowed = {r.name: r.specifier.contains(LOCKED[canonicalize_name(r.name)]) for r in REQUIRED}
    assert all(allowed.values()), allowed
    assert not [name for name, version in LOCKED.items() if version.local or version.is_devrelease]


def test_dependencies_of_dependencies_are_locked_too():
    """Otherwise pip rejects the lock; checked for packages that are installed here in the locked version."""
    needed, checked = {}, 0
    for name, version in LOCKED.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if Version(Version(found.version).public) == version:
            checked += 1
            needs = map(Requirement, found.requires or ())
            needed |= {canonicalize_name(r.name): name for r in needs if not r.marker or r.marker.evaluate(TARGET)}
    assert not needed.keys() - LOCKED.keys()
    assert checked > 20


def test_compromised_releases_of_lightning_are_excluded():
    (lightning,) = (requirement for requirement in REQUIRED if requirement.name == "lightning")
    assert not any(lightning.specifier.contains(bad) for bad in ("2.6.2", "2.6.3"))
    assert LOCKED["lightning"] == LOCKED["pytorch-lightning"] >= Version("2.6.6")


def test_lower_bounds_exclude_vulnerable_releases():
    floors = {"lightning": "2.6.6", "monai": "1.6.1", "jupyterlab": "4.2.5"}
    for requirement in REQUIRED:
        if floor := floors.pop(requirement.name, None):
            assert not requirement.specifier.contains(f"{floor}rc1", prereleases=True)
            assert requirement.specifier.contains(floor)
    assert not floors
