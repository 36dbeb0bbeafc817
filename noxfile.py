"""The built package on every Python that is here, with the oldest and the newest Prefect: `make matrix`.

What is built is what is tried: the wheel that is made of the source distribution, in an environment of its
own, beside a copy of the project that has no package in it.
"""

from __future__ import annotations

import re
import shutil
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


@nox.session(python=PYTHONS)
@nox.parametrize("prefect", ["oldest", "newest"])
def package(session: nox.Session, prefect: str) -> None:
    """Install the wheel; run the command, the unit tests and the demo with it."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    project = ROOT / "build" / "matrix" / f"python-{session.python}-{prefect}"
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir(parents=True)
    for name in BESIDE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, project / name)
        else:
            shutil.copy2(ROOT / name, project / name, follow_symlinks=False)
    constraints = project / "constraints.txt"
    constraints.write_text(_constraints(prefect), encoding="utf-8")
    dev = nox.project.dependency_groups(PYPROJECT, "dev")
    session.install("--constraint", str(constraints), f"{wheel}[mysql,embedded]", *dev)
    session.chdir(project)
    session.run("taskadapter", "--version")
    # What an image is built of is the source, which is not here.
    source = "tests/unit/test_deployments.py::test_the_image_has_what_it_copies"
    session.run("python", "-m", "pytest", "--quiet", "tests/unit", "--deselect", source)
    session.run("python", "-m", "deployments.demo")


def _constraints(prefect: str) -> str:
    """Return the versions that are tested together; with the oldest Prefect those that it asks for."""
    if prefect == "newest":
        return CONSTRAINTS.read_text(encoding="utf-8")
    dependencies = PYPROJECT["project"]["dependencies"]
    (oldest,) = (found[1] for line in dependencies if (found := re.match(r"prefect>=([\d.]+)", line)))
    return f"prefect=={oldest}\n"
