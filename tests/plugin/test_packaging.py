"""What an installation contains, and that its facts agree."""

from __future__ import annotations

import email
import json
import re
import zipfile
from pathlib import Path

import pytest

import nnunet_diffext

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED_AS = {
    "nnunet_diffext": "nnunet_diffext",
    "trainers": "nnunet_diffext/trainers",
    "planners": "nnunet_diffext/planners",
}


@pytest.fixture
def archive(wheel: Path):
    with zipfile.ZipFile(wheel) as opened:
        yield opened


def metadata_file(archive: zipfile.ZipFile, name: str) -> str:
    (path,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
    return archive.read(path).decode()


def test_one_name_in_site_packages(archive: zipfile.ZipFile) -> None:
    assert {n.split("/")[0] for n in archive.namelist()} == {
        "nnunet_diffext",
        f"nnunet_diffext-{nnunet_diffext.__version__}.dist-info",
    }


def test_wheel_holds_every_module_and_nothing_else(archive: zipfile.ZipFile) -> None:
    expected = {
        f"{target}/{file.relative_to(REPOSITORY / folder).as_posix()}"
        for folder, target in INSTALLED_AS.items()
        for file in (REPOSITORY / folder).rglob("*.py")
    }
    packed = {n for n in archive.namelist() if not n.split("/")[0].endswith(".dist-info")}
    assert packed == expected | {"nnunet_diffext/py.typed"}


def test_scanned_directory_holds_exactly_one_module(archive: zipfile.ZipFile) -> None:
    # nnU-Net imports whatever lies there; with an __init__.py it would be a package.
    inside = [n for n in archive.namelist() if n.startswith("nnunet_diffext/ext_trainers/")]
    assert inside == ["nnunet_diffext/ext_trainers/nnunet_diffext_index.py"]


def test_metadata(archive: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(metadata_file(archive, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    core = {r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r}
    assert core == {"torch", "nnunetv2<2.9,>=2.8.0", "monai<1.8,>=1.6", "scipy>=1.15", "filelock"}
    assert metadata_file(archive, "entry_points.txt").split("\n")[1] == "nnunet_diffext = nnunet_diffext.cli.main:main"
    assert "Apache License" in metadata_file(archive, "licenses/LICENSE")


def test_versions_agree(archive: zipfile.ZipFile) -> None:
    version = email.message_from_string(metadata_file(archive, "METADATA"))["Version"]
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)
    assert version == nnunet_diffext.__version__ == released[0]


def test_wheel_install_imports_and_is_discovered(environment) -> None:
    code = """
import json, nnunet_diffext, nnunet_diffext.planners
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
cls = recursive_find_trainer_class_by_name("nnUNetTrainer_3epochs")
print(json.dumps([nnunet_diffext.__file__, nnunet_diffext.planners.__file__, cls.__module__, cls.__name__]))
"""
    printed = environment.run("-m", "nnunet_diffext.cli.main", "trainer_dir").stdout.strip()
    assert printed == str(environment.trainer_dir)
    found = environment.run("-c", code, ext_trainer=printed)
    assert found.returncode == 0, found.stderr
    *files, module, name = json.loads(found.stdout.splitlines()[-1])
    assert all(Path(f).is_relative_to(environment.site) for f in files), "not from the wheel"
    assert (module.split(".")[0], name) == ("nnunet_diffext", "nnUNetTrainer_3epochs")
