"""The built package on every Python that is here, on the oldest with the oldest Prefect too: `make matrix`.

What is built is what is tried: the wheel that is made of the source distribution, in an environment of its
own, beside a copy of the project that has no package in it. Agents are tried on the other Prefect's server.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "deployments" / "constraints.txt"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
BESIDE = (
    *("deployments", "docs", "flows", "tests"),
    *("CHANGELOG.md", "LICENSE", "Makefile", "README.md", "mkdocs.yml", "prefect.yaml", "pyproject.toml"),
)
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False


OTHER = {"oldest": "newest", "newest": "oldest"}

# As in the Makefile.
PYTEST = (
    *("python", "-m", "pytest", "--quiet"),
    *("--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder"),
)


def find_pythons() -> None:
    """Put those of pyenv on the path that it has and has not switched on: its `python3.12` only says so."""
    for version in PYTHONS:
        name = f"python{version}"
        found = shutil.which(name)
        if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:  # noqa: S603
            continue
        root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        own = (str(path.parent) for path in sorted(root.glob(f"versions/{version}.*/bin/{name}")))
        os.environ["PATH"] = os.pathsep.join([*own, os.environ["PATH"]])


find_pythons()


@nox.session(python=PYTHONS[:1])
@nox.parametrize("prefect", list(OTHER))
def package(session: nox.Session, prefect: str) -> None:
    """Install the wheel; run the command, the unit tests, the demo, and agents on the other server."""
    wheel, project = _try_alone(session, prefect)
    server = project / "server"
    session.run("python", "-m", "venv", str(server))
    other = "--constraint", _constraints(project, OTHER[prefect])
    session.run(str(server / "bin" / "pip"), "install", "--quiet", *other, str(wheel), external=True)
    session.run(
        *PYTEST,
        "tests/acceptance/test_outcomes.py",
        "tests/acceptance/test_prefect.py",
        "tests/integration/test_scheduler.py",
        env={"TASKADAPTER_TEST_PREFECT": str(server / "bin" / "prefect")},
    )


@nox.session(python=PYTHONS[1:])
def newer(session: nox.Session) -> None:
    """The same on a newer Python, with one server."""
    _try_alone(session, "newest")


def _try_alone(session: nox.Session, prefect: str) -> tuple[Path, Path]:
    """Install the wheel; run the command, the unit tests and the demo; return wheel and project."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    project = ROOT / "build" / "matrix" / f"python-{session.python}-{prefect}"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    for name in BESIDE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, project / name)
        else:
            shutil.copy2(ROOT / name, project / name, follow_symlinks=False)
    constraints = _constraints(project, prefect)
    dev = nox.project.dependency_groups(PYPROJECT, "dev")
    session.install("--constraint", constraints, f"{wheel}[mysql,embedded]", *dev)
    session.chdir(project)
    session.run("taskadapter", "--version")
    # What an image is built of is the source, which is not here.
    source = "tests/unit/test_deployments.py::test_the_image_has_what_it_copies"
    session.run(*PYTEST, "tests/unit", "--deselect", source)
    session.run("python", "-m", "deployments.demo")
    return wheel, project


def _constraints(folder: Path, prefect: str) -> str:
    """Write down the versions that are tested together; with the oldest Prefect those that it asks for."""
    path = folder / f"constraints-{prefect}.txt"
    if prefect == "newest":
        shutil.copy2(CONSTRAINTS, path)
    else:
        dependencies = PYPROJECT["project"]["dependencies"]
        (oldest,) = (found[1] for line in dependencies if (found := re.match(r"prefect>=([\d.]+)", line)))
        path.write_text(f"prefect=={oldest}\n", encoding="utf-8")
    return str(path)
