"""What is noted in every run folder: versions, commit and device."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax


def environment() -> dict[str, str]:
    """Versions, commit and device: what else a number may depend on."""
    device = jax.devices()[0]
    return {
        "sartor": version("sartor"),
        "jax": version("jax"),
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "cpus": str(os.cpu_count()),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the source tree; "unknown" for an installed package."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "."], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + (" with changes" if changed else "")
