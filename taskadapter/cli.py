"""The command ``taskadapter``: only what Prefect's own command lacks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from taskadapter.errors import TaskError

app = App(name="taskadapter", help="Periodic Prefect jobs, each on exactly one of several machines.")


@app.command
def render(
    *,
    flows: Annotated[Path, Parameter(help="The folder of flow modules.")] = Path("flows"),
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="The file to write.")] = Path(
        "deployments/prefect.yaml"
    ),
    check: Annotated[
        bool, Parameter(help="Write nothing; exit with 1 if the file is not up to date.")
    ] = False,
) -> None:
    """Write the deployments that the flow modules declare into a prefect.yaml."""
    from taskadapter import deploy

    text = deploy.render(flows, output)
    if not check:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise TaskError(f"{output} cannot be written: {error.strerror}.") from error
        print(f"Wrote {output}. To deploy it:")
        print(f"  prefect --no-prompt deploy --prefect-file {output} --all")
    elif not output.exists() or output.read_text(encoding="utf-8") != text:
        raise TaskError(f"{output} is not what {flows}/ declares; run `taskadapter render`.")


def main() -> None:
    """Run the command; an error is one line on standard error, and exit status 1."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        app(sys.argv[1:])
    except TaskError as error:
        print(f"taskadapter: {error}", file=sys.stderr)
        sys.exit(1)
