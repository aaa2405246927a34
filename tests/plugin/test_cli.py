"""The command line: verbs, errors and exit codes, doctor, variants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_diffext.cli import _checks
from nnunet_diffext.cli.main import VERBS, build_parser, main
from nnunet_diffext.trainers import TRAINERS, find_trainer
from nnunet_diffext.variants import describe_tokens


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trainer_dir"], ["enable", "--help"]])
def test_quick_verbs_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom nnunet_diffext.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as e:\n    assert not e.code\n"
        "print({'torch', 'numpy', 'nnunetv2', 'monai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["set()"], done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_registers_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser(verb).parse_args([verb, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: nnunet_diffext {verb}") and "--debug" in printed


@pytest.mark.parametrize("arguments", [[], ["no_such_verb"], ["trainer_dir", "--no-such-flag"], ["trainer_dir", "x"]])
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: nnunet_diffext" in capsys.readouterr().err


def test_trainer_dir_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainer_dir"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert [p.name for p in Path(line).glob("*.py")] == ["nnunet_diffext_index.py"]


def test_user_errors_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "NoSuchTrainer"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nnunet_diffext variants: error: ") and "Traceback" not in printed.err
    assert all(name in printed.err for name in ("NoSuchTrainer", *TRAINERS))


@pytest.mark.parametrize("before_verb", [True, False])
def test_debug_shows_the_traceback(before_verb: bool) -> None:
    words = ["--debug", "variants"] if before_verb else ["variants", "--debug"]
    with pytest.raises(ValueError, match="NoSuchTrainer"):
        main([*words, "NoSuchTrainer"])


def test_variants_lists_the_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants"]) == 0
    terms = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if line[2:3].strip()}
    assert set(TRAINERS) <= terms


@pytest.mark.parametrize("trainer", TRAINERS)
def test_variants_lists_every_token(trainer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", trainer]) == 0
    printed = capsys.readouterr().out
    tokens = describe_tokens(find_trainer(trainer).Settings)
    assert tokens and [t.pattern for t in tokens if f"\n  {t.pattern} " not in printed] == []
    assert f"{find_trainer(trainer).Settings().epochs})" in printed, "the default number of epochs"


def test_variants_resolves_a_full_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "nnUNetTrainer_7epochs_lr1e-3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"* epochs = 7", "* initial_lr = 0.001", "  momentum = 0.99"} <= set(lines)


def test_variants_unknown_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "nnUNetTrainer_nonsense"]) == 1
    printed = capsys.readouterr().err
    assert "nonsense" in printed and "<number>epochs" in printed


def doctor(**changes: str | None) -> tuple[int, dict[str, dict], bool]:
    """Exit code, findings by name, and verdict of ``doctor --json`` in a fresh process."""
    env = {k: v for k, v in {**os.environ, **changes}.items() if v is not None}
    command = [sys.executable, "-m", "nnunet_diffext.cli.main", "doctor", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in report["checks"]}, report["ok"]


def test_doctor_is_content_with_a_good_setup() -> None:
    code, checks, ok = doctor()
    assert [c for c in checks.values() if c["status"] == "fail"] == []
    assert (code, ok) == (0, True)
    assert {"python", "torch", "nnunetv2", "monai", "nnUNet_results", "discovery", "device"} <= set(checks)
    assert {f"trainer {name}" for name in TRAINERS} <= set(checks)


def test_doctor_fails_without_discovery_and_folders() -> None:
    code, checks, ok = doctor(nnUNet_extTrainer=None, nnUNet_raw=None, nnUNet_results="/no/such/folder")
    assert (code, ok) == (1, False)
    failed = {name for name, check in checks.items() if check["status"] == "fail"}
    assert failed == {"discovery", "nnUNet_raw", "nnUNet_results"}
    assert "enable" in checks["discovery"]["remedy"] and "export nnUNet_raw=" in checks["nnUNet_raw"]["remedy"]
    assert all(checks[name]["remedy"] for name in failed)


def test_doctor_judges_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "100000")
    monkeypatch.setenv("nnUNet_def_n_proc", "many")
    found = {check.name: check.status for check in _checks.check_processes()}
    assert found == {"nnUNet_n_proc_DA": "warn", "nnUNet_def_n_proc": "fail"}


def test_doctor_judges_versions() -> None:
    from packaging.requirements import Requirement

    def status(requirement: str) -> str:
        return _checks._check_requirement(Requirement(requirement)).status

    assert status("nnunetv2>=2.8.0,<2.9") == "ok"
    assert status("nnunetv2<2.0") == status("nnunetv2>=99") == status("surely-not-installed-anywhere") == "fail"


def test_doctor_human_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_diffext.cli import doctor as verb

    # The checks that need no process of their own.
    monkeypatch.setattr(verb, "ALL_CHECKS", (_checks.check_versions, _checks.check_folders))
    monkeypatch.delenv("nnUNet_raw")
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "[fail] nnUNet_raw: is not set" in lines
    assert lines[lines.index("[fail] nnUNet_raw: is not set") + 1].startswith("       -> export nnUNet_raw=")
    assert any(line.startswith("[ok]   nnunetv2: ") for line in lines)
    assert lines[-1].startswith("1 failed")
