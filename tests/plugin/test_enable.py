"""``enable`` and ``disable`` in a throw-away environment, with real interpreters."""

from __future__ import annotations

import os
import shutil
import timeit
from pathlib import Path

import pytest

from nnunet_diffext.cli.enable import export_command, pth_line

SHOW = ("-c", "import os; print(os.environ.get('nnUNet_extTrainer'))")


def cli(environment, *arguments: str):
    return environment.run("-m", "nnunet_diffext.cli.main", *arguments)


def test_round_trip(environment) -> None:
    ours, user = str(environment.trainer_dir), str(environment.site.parent)
    pth = environment.site / "nnunet_diffext.pth"
    assert environment.run(*SHOW).stdout.strip() == "None", "installing alone must not switch anything on"

    enabled = cli(environment, "enable")
    assert enabled.returncode == 0, enabled.stderr
    assert str(pth) in enabled.stdout and "disable" in enabled.stdout
    assert environment.run(*SHOW).stdout.strip() == ours
    assert environment.run(*SHOW, ext_trainer="").stdout.strip() == ours
    assert environment.run(*SHOW, ext_trainer=user).stdout.strip() == user + os.pathsep + ours
    both = ours + os.pathsep + user
    assert environment.run(*SHOW, ext_trainer=both).stdout.strip() == both, "no directory twice, order kept"

    before = pth.read_bytes()
    again = cli(environment, "enable")
    assert again.returncode == 0 and "Already enabled" in again.stdout and pth.read_bytes() == before
    assert len(before.splitlines()) == 1

    disabled = cli(environment, "disable")
    assert disabled.returncode == 0 and str(pth) in disabled.stdout
    assert environment.run(*SHOW).stdout.strip() == "None" and not pth.exists()
    again = cli(environment, "disable")
    assert again.returncode == 0 and "Not enabled" in again.stdout


def test_enable_replaces_the_file_of_another_installation(environment, tmp_path: Path) -> None:
    (environment.site / "nnunet_diffext.pth").write_text(pth_line(tmp_path / "elsewhere"))
    assert cli(environment, "enable").returncode == 0
    assert environment.run(*SHOW).stdout.strip() == str(environment.trainer_dir)


def test_interpreter_survives_an_uninstalled_package(environment) -> None:
    assert cli(environment, "enable").returncode == 0
    shutil.rmtree(environment.site / "nnunet_diffext")
    started = environment.run(*SHOW, ext_trainer="/of/the/user")
    assert (started.returncode, started.stdout.strip(), started.stderr) == (0, "/of/the/user", "")


def test_not_writable_offers_the_export(environment) -> None:
    # A folder of that name cannot be written as a file, not even by root, who ignores permissions.
    (environment.site / "nnunet_diffext.pth").mkdir()
    failed = cli(environment, "enable")
    assert failed.returncode == 1
    assert "cannot write" in failed.stderr and export_command(environment.trainer_dir) in failed.stderr
    assert "Traceback" not in failed.stderr
    assert cli(environment, "disable").returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell command")
@pytest.mark.parametrize(("before", "after"), [(None, "{ours}"), ("/of/user", "/of/user:{ours}")])
def test_export_command_keeps_the_users_value(environment, before: str | None, after: str) -> None:
    ours = environment.trainer_dir
    script = f'import os; os.execvp("sh", ["sh", "-c", {export_command(ours) + "; echo $nnUNet_extTrainer"!r}])'
    assert environment.run("-c", script, ext_trainer=before).stdout.strip() == after.format(ours=ours)


def test_line_is_ascii_and_costs_below_a_millisecond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "Größe 'quoted' \\ backslash"
    directory.mkdir()
    line = pth_line(directory)
    assert line.isascii() and line.startswith("import ") and line.count("\n") == 1
    monkeypatch.delenv("nnUNet_extTrainer")
    exec(line)
    assert os.environ["nnUNet_extTrainer"] == str(directory)
    assert timeit.timeit(lambda: exec(line), number=200) / 200 < 1e-3
