"""Commands as subprocesses: what they leave behind, and what a failure says."""

import os
import sys

import pytest

from nnunet_diffext.demo.commands import CommandError, EpochReport, in_environment, nnunet_environment, run_command

LOG = """
2026-11-20 12:09:08.771162:
2026-11-20 12:09:08.771162: Epoch 2
2026-11-20 12:09:08.771162: Current learning rate: 0.01
2026-11-20 12:09:39.017042: train_loss -0.7072
2026-11-20 12:09:39.017930: val_loss -0.7666
2026-11-20 12:09:39.017942: Pseudo dice [np.float32(0.7101), nan]
2026-11-20 12:09:39.017984: Epoch time: 62.22 s
2026-11-20 12:09:39.699049: Yayy! New best EMA pseudo Dice: 0.7
2026-11-20 12:13:37.834160: Mean Validation Dice:  0.8437126
"""


def python_named(tmp_path, monkeypatch, name):
    """Put this interpreter on PATH as a command called ``name``."""
    (tmp_path / name).symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return name


def test_epoch_report_makes_one_line_per_epoch():
    report = EpochReport(30)
    lines = [text for text in map(report, LOG.splitlines()) if text is not None]
    assert lines == [
        "epoch 3/30  62.22 s  loss -0.7072  pseudo Dice 0.7101, nan",
        "final validation: mean Dice 0.8437",
    ]


def test_environment_keeps_the_users_trainers_and_adds_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/somewhere/else")
    env = nnunet_environment(tmp_path, 3)
    first, ours = env["nnUNet_extTrainer"].split(os.pathsep)
    assert first == "/somewhere/else" and os.listdir(ours)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert env[name] == str(tmp_path / name) and os.path.isdir(env[name])
    assert env["nnUNet_n_proc_DA"] == "3"
    assert os.environ["nnUNet_extTrainer"] == "/somewhere/else"


def test_in_environment_sets_nnunets_variables_and_restores_all(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "before")
    monkeypatch.delenv("nnUNet_results", raising=False)
    with pytest.raises(KeyError), in_environment({"nnUNet_raw": "a", "nnUNet_results": "b", "OTHER_VARIABLE": "c"}):
        assert os.environ["nnUNet_raw"] == "a" and os.environ["nnUNet_results"] == "b"
        os.environ["OTHER_VARIABLE"]
    assert os.environ["nnUNet_raw"] == "before" and "nnUNet_results" not in os.environ


def test_command_is_printed_logged_and_reported(tmp_path, monkeypatch, capsys):
    name = python_named(tmp_path, monkeypatch, "some_python")
    code = "import os, sys; print('Epoch', os.environ['ANSWER']); print('to stderr', file=sys.stderr)"
    result = run_command(
        [name, "-c", code], {**os.environ, "ANSWER": "42"}, tmp_path / "logs" / "a.log", report=str.strip
    )
    assert sorted(result.log.read_text().splitlines()) == ["Epoch 42", "to stderr"]
    assert result.command.startswith("some_python -c ") and result.seconds > 0
    printed = capsys.readouterr().out
    assert printed.startswith("$ some_python -c ") and "    Epoch 42\n" in printed


def test_failure_shows_the_last_lines_and_the_log(tmp_path, monkeypatch):
    name = python_named(tmp_path, monkeypatch, "some_python")
    code = "for i in range(100): print('line', i)\nraise SystemExit('out of memory')"
    with pytest.raises(CommandError) as error:
        run_command([name, "-c", code], os.environ, tmp_path / "a.log")
    message = str(error.value)
    assert "exit status 1" in message and "out of memory" in message and "line 99" in message
    assert "line 50\n" not in message and str(tmp_path / "a.log") in message
    assert "line 50\n" in (tmp_path / "a.log").read_text()


def test_missing_command_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_command_here"):
        run_command(["no_such_command_here"], os.environ, tmp_path / "a.log")
