"""What ``nnunet_diffext doctor`` looks at. Every check returns findings instead of raising."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nnunet_diffext.cli.enable import VARIABLE, export_command, pth_file, pth_line
from nnunet_diffext.cli.trainer_dir import trainer_directory

PACKAGE = "nnunet_diffext"
LOW_DISK_GB, FULL_DISK_GB = 20.0, 1.0
DISCOVERY_TIMEOUT_S = 600

# Runs in a process of its own, as nnUNetv2_train does. nnU-Net prints while it searches: the answer is the last line.
_DISCOVERY_CODE = """
import json, sys
sys.path = [entry for entry in sys.path if entry]  # not the current directory, as in a console script
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = recursive_find_trainer_class_by_name(name).__module__
    except BaseException as error:
        found[name] = f"!{type(error).__name__}: {error}"
print()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One finding: ``status`` is "ok", "warn" or "fail", ``remedy`` says what to do about it (empty if nothing)."""

    name: str
    status: str
    message: str
    remedy: str = ""


def check_versions() -> Iterator[Check]:
    """Python and the core dependencies against the ranges that the installed package declares."""
    try:
        info = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        yield Check(PACKAGE, "fail", "runs from a folder, but is not installed", "pip install it; see the README")
        return
    yield Check(PACKAGE, "ok", metadata.version(PACKAGE))
    python, wanted = ".".join(map(str, sys.version_info[:3])), info["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(python, prereleases=True):
        yield Check("python", "ok", f"{python} (supported: {wanted})")
    else:
        yield Check("python", "fail", f"{python} (supported: {wanted})", "make an environment with a supported Python")
    for requirement in _requirements(PACKAGE):
        yield _check_requirement(requirement)
    # nnU-Net excludes some versions of torch and of its own libraries; pip checks that only when it installs.
    for requirement in _requirements("nnunetv2"):
        check = _check_requirement(requirement)
        if check.status != "ok":
            yield Check(f"{check.name} for nnunetv2", check.status, check.message, check.remedy)


def check_extras() -> Iterator[Check]:
    """The optional dependencies. That one is absent is no fault."""
    for extra in ("text", "pretrained"):
        missing = [r.name for r in _requirements(PACKAGE, extra) if _version(r.name) is None]
        absent = f"not installed: {', '.join(missing)} (optional: pip install '{PACKAGE}[{extra}]')"
        yield Check(f"extra {extra}", "ok", absent if missing else "present")


def check_folders() -> Iterator[Check]:
    """nnU-Net's three folders: set, existing, writable, with free space."""
    for name, writes in (("nnUNet_raw", False), ("nnUNet_preprocessed", True), ("nnUNet_results", True)):
        value = os.environ.get(name)
        if not value:
            yield Check(name, "fail", "is not set", f"export {name}=/path/to/{name}")
        elif not os.path.isdir(value):
            yield Check(name, "fail", f"{value} is no folder", f"create it: mkdir -p '{value}'")
        elif writes and not os.access(value, os.W_OK):
            yield Check(name, "fail", f"{value} is not writable", "change its permissions, or use another folder")
        else:
            yield Check(name, "ok", value)
            if writes:
                yield _check_disk(name, value)


def check_discovery() -> Iterator[Check]:
    """Whether nnU-Net's own look-up, in a fresh process, finds our class for every trainer."""
    from nnunet_diffext.trainers import TRAINERS

    directory = str(trainer_directory())
    env = dict(os.environ)
    entries = [e for e in env.get(VARIABLE, "").split(os.pathsep) if e]
    pth, expected = pth_file(), pth_line(trainer_directory())
    if pth.is_file() and pth.read_text(encoding="utf-8") != expected:
        yield Check("enable", "warn", f"{pth} points to another installation", f"run: {PACKAGE} enable")
    if directory in entries:
        how = f"through {pth}" if pth.is_file() else f"through {VARIABLE}"
        yield Check("discovery", "ok", f"nnU-Net searches {directory} ({how})")
    else:
        remedy = f"run: {PACKAGE} enable; or: {export_command(trainer_directory())}"
        yield Check("discovery", "fail", f"{VARIABLE} does not contain {directory}", remedy)
        env[VARIABLE] = os.pathsep.join([*entries, directory])  # what else is wrong shows up all the same

    # A variant of each, because nnU-Net finds its own nnUNetTrainer first. Every trainer knows the token seed<number>.
    names = {base: f"{base}_seed0" for base in TRAINERS}
    found = _find_trainers(list(names.values()), env)
    for base, name in names.items():
        answer = found[name]
        if answer.startswith("!"):
            yield Check(f"trainer {base}", "fail", answer[1:], f"try: python -c 'import {TRAINERS[base]}'")
        elif answer.split(".")[0] != PACKAGE:
            remedy = f"remove or rename the other class, or put {directory} first in {VARIABLE}"
            yield Check(f"trainer {base}", "warn", f"nnU-Net finds a class of this name in {answer}", remedy)
        else:
            yield Check(f"trainer {base}", "ok", f"found in {TRAINERS[base]}")


def check_device() -> Iterator[Check]:
    """The accelerator, and what nnU-Net will do about torch.compile."""
    try:
        import torch
    except ImportError as error:
        yield Check("device", "fail", f"torch cannot be imported: {error}", "reinstall torch")
        return
    if torch.cuda.is_available():
        gpu, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
        yield Check("device", "ok", f"cuda: {count} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
        yield _check_compile()
    elif torch.backends.mps.is_available():
        yield Check("device", "ok", "mps: pass -device mps to nnU-Net's commands (no torch.compile there)")
    elif shutil.which("nvidia-smi"):
        message = f"nvidia-smi is present, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
        yield Check("device", "warn", message, "check the driver, or install a torch build that fits it")
    else:
        yield Check("device", "warn", "cpu only: training is slow", "pass -device cpu to nnU-Net's commands")


def check_processes() -> Iterator[Check]:
    """Worker processes that nnU-Net will start, against the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, default, purpose in (
        ("nnUNet_n_proc_DA", min(12, os.cpu_count() or 1), "augmentation"),
        ("nnUNet_def_n_proc", 8, "preprocessing and export"),
    ):
        value = os.environ.get(name, str(default))
        if not value.isdecimal():
            yield Check(name, "fail", f"'{value}' is no whole number", f"export {name}={cores}")
        elif int(value) > cores:
            yield Check(name, "warn", f"{value} processes for {purpose} on {cores} core(s)", f"export {name}={cores}")
        else:
            yield Check(name, "ok", f"{value} process(es) for {purpose} on {cores} core(s)")


ALL_CHECKS = (check_versions, check_extras, check_folders, check_discovery, check_device, check_processes)


def _requirements(package: str, extra: str = "") -> list[Requirement]:
    try:
        requirements = [Requirement(r) for r in metadata.requires(package) or []]
    except metadata.PackageNotFoundError:
        return []
    # The unconditional ones, or those that only this extra adds.
    return [r for r in requirements if _applies(r, extra) and (not extra or not _applies(r, ""))]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _check_requirement(requirement: Requirement) -> Check:
    name, wanted = requirement.name, str(requirement.specifier) or "any"
    version = _version(name)
    remedy = f"pip install '{name}{requirement.specifier}'"
    if version is None:
        return Check(name, "fail", f"is not installed (needed: {wanted})", remedy)
    message = f"{version} (supported: {wanted})"
    if requirement.specifier.contains(version, prereleases=True):
        return Check(name, "ok", message)
    return Check(name, "fail", message, remedy)


def _check_disk(name: str, folder: str) -> Check:
    free = shutil.disk_usage(folder).free / 2**30
    if free < LOW_DISK_GB:
        status = "fail" if free < FULL_DISK_GB else "warn"
        return Check(f"{name} disk", status, f"{free:.1f} GiB free", f"make room or move {name} to another disk")
    return Check(f"{name} disk", "ok", f"{free:.0f} GiB free")


def _check_compile() -> Check:
    # nnU-Net compiles on CUDA unless it is told not to; Triton needs a C compiler at run time.
    if os.name == "nt":
        return Check("torch.compile", "ok", "off: nnU-Net does not use it on Windows")
    if os.environ.get("nnUNet_compile", "true").lower() not in ("true", "1", "t"):
        return Check("torch.compile", "ok", "off (nnUNet_compile)")
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return Check("torch.compile", "warn", "on, but no C compiler", "install gcc, or export nnUNet_compile=f")
    return Check("torch.compile", "ok", "on for stock trainers (off: export nnUNet_compile=f), never for ours")


def _find_trainers(names: list[str], env: dict[str, str]) -> dict[str, str]:
    """Name -> module of the class that nnU-Net finds, or "!" and the error."""
    command = [sys.executable, "-c", _DISCOVERY_CODE, *names]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=DISCOVERY_TIMEOUT_S
        )
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return dict.fromkeys(names, f"!no answer within {DISCOVERY_TIMEOUT_S} s")
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return dict.fromkeys(names, f"!nnU-Net's look-up failed: {last}")
