"""Maps the top-level folders ``trainers/`` and ``planners/`` into the package; everything else is in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

# A single name, nnunet_diffext, arrives in site-packages.
PACKAGE_DIR = {
    "nnunet_diffext": "nnunet_diffext",
    "nnunet_diffext.trainers": "trainers",
    "nnunet_diffext.planners": "planners",
}


def packages() -> list[str]:
    """Every package of the distribution, by its installed name."""
    return [
        name
        for root, folder in PACKAGE_DIR.items()
        for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ]


setup(
    package_dir=PACKAGE_DIR,
    packages=packages(),
    # ext_trainers/ is a plain directory that nnU-Net scans. With an __init__.py it would be a package, and the module
    # in it would exist under two names; so it travels as data.
    package_data={"nnunet_diffext": ["py.typed", "ext_trainers/*.py"]},
    include_package_data=False,
)
