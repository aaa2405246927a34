"""A wheel of the working tree, and a throw-away virtual environment that holds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "nnunet_diffext", "trainers", "planners")


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its interpreter and its site-packages."""

    python: Path
    site: Path

    @property
    def trainer_dir(self) -> Path:
        return self.site / "nnunet_diffext" / "ext_trainers"

    def run(self, *arguments: str, ext_trainer: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the interpreter with nnUNet_extTrainer unset or set to ``ext_trainer``."""
        env = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "PYTHONPATH")}
        if ext_trainer is not None:
            env["nnUNet_extTrainer"] = ext_trainer
        command = [str(self.python), *arguments]
        return subprocess.run(command, env=env, cwd=self.site, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy of the sources (setuptools leaves files beside what it builds)."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        item = REPOSITORY / name
        if item.is_dir():
            shutil.copytree(item, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif item.exists():
            shutil.copy(item, source / name)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", code, str(output)], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture
def environment(tmp_path: Path, wheel: Path) -> Environment:
    """An environment with the wheel in its own site-packages and nnU-Net borrowed from the running interpreter."""
    root = tmp_path / "environment"
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(root)
    python = root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Path entries come behind the environment's own packages, and .pth files in them (an editable install) do not run.
    borrowed = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return Environment(python, site)
