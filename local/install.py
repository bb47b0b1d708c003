"""Install a file of hashed requirements into `.venv`, made when missing, showing progress; or the chart library.

Runs on the bare machine, before anything is installed: standard library only.
Usage: install.py local|bench|development|page
"""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PAGE = ROOT / "services" / "api_gateway" / "page"
ERROR_LINES_MAX = 5
NPM_SECONDS_MAX = 120.0


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  # run by whatever python3 the machine has
        sys.exit(
            f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.13 …"
        )
    name = sys.argv[1]
    if name == "page":
        _install_chart_library()
        return
    requirements = ROOT / "requirements" / f"{name}.txt"
    pip = _environment()
    wanted = len(re.findall(r"^[a-z0-9]", requirements.read_text(), flags=re.MULTILINE))
    command = [*pip, "install", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    # The file is complete, so there is nothing to resolve; modules are compiled when first imported.
    command += ["--no-deps", "--no-compile", "--progress-bar", "off", "-r", str(requirements)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        errors: list[str] = []
        seen = 0
        for line in running.stdout:
            if line.startswith(("Collecting ", "Requirement already satisfied")):
                seen = min(seen + 1, wanted)
                _show(f"packages: {seen} of {wanted} fetched")
            elif line.startswith("Installing collected"):
                _show("packages: installing")
            elif "error" in line.lower():
                errors.append(line.strip())
    if running.returncode != 0:
        print()
        sys.exit("packages could not be installed:\n  " + "\n  ".join(errors[:ERROR_LINES_MAX]))
    (VENV / f".{name}").touch()
    _show(f"packages: {wanted} ready")
    print()


def _install_chart_library() -> None:
    """Install the chart library of the page; without it everything runs, and the page says what it lacks."""
    if not shutil.which("npm"):
        print(
            "chart library: not installed, as there is no npm; the page will have no chart (apt-get install npm)"
        )
        return
    # What a package would run when it is installed is not run.
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    try:
        done = subprocess.run(
            command, cwd=PAGE, capture_output=True, text=True, timeout=NPM_SECONDS_MAX, check=False
        )
        problem = "" if done.returncode == 0 else done.stderr or "npm ci failed"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        errors = re.findall(r"^npm (?:error|ERR!) (?!A complete log)(.+)$", problem, flags=re.MULTILINE)
        reason = max(errors, key=len, default=problem).strip()  # the others are codes
        print(f"chart library: not installed, the page will have no chart: {reason}")
        return
    (PAGE / "node_modules" / ".package-lock.json").touch()
    print("chart library: ready")


def _environment() -> list[str]:
    """Create the virtual environment; return the command of a pip that installs into it.

    A bare Debian has Python without ensurepip: then the system's own pip, if there is one, fills it.
    """
    kept = VENV / "pip-command"  # written last: an environment without it was not finished
    if kept.exists():
        return kept.read_text().split("\n")
    print(f"making {VENV.name} with Python {sys.version.split()[0]}", flush=True)
    python = str(VENV / "bin" / "python")
    pip = [python, "-m", "pip"]
    try:
        venv.create(VENV, clear=True, with_pip=True)
    except OSError as error:
        sys.exit(f"{VENV} cannot be made: {error}")
    except subprocess.CalledProcessError:
        venv.create(VENV, clear=True, with_pip=False)
        system_pip = [sys.executable, "-m", "pip"]
        if subprocess.run([*system_pip, "--version"], capture_output=True, check=False).returncode != 0:
            sys.exit("Python has neither venv nor pip here: apt-get install python3-venv (or python3-pip)")
        pip = [*system_pip, "--python", python]
    kept.write_text("\n".join(pip))
    return pip


def _show(text: str) -> None:
    end = "" if sys.stdout.isatty() else "\n"
    start = "\r\033[K" if sys.stdout.isatty() else ""
    if sys.stdout.isatty() or not re.search(r"[1-9] of", text):  # in a log: every tenth package
        print(f"{start}{text}", end=end, flush=True)


main()
