"""Executes a notebook of this folder in a fresh kernel, and writes it as one HTML page.

    python notebooks/render.py                                  # what `make notebook` does
    python notebooks/render.py --set NUM_CALIBRATION=64 --html out.html

The notebook itself is kept without outputs; the page shows them. Parameters are set as papermill
does it: by a cell behind the one that is tagged "parameters".
"""

import argparse
import ast
import copy
import hashlib
import html
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbclient
import nbformat

from qmoe_jax.atomic_file import open_atomically

CHECKOUT = Path(__file__).resolve().parent.parent
# What TensorFlow says of the machine when it is imported.
_TENSORFLOW_STARTS = re.compile(r"WARNING: All log messages before absl|[IWE]\d{4} ")
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="notebook-sha256" content="{digest}">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem }}
body {{ margin: 2rem auto; padding: 0 1rem }}
pre {{ font: 13px/1.4 ui-monospace, monospace; margin: 0; padding: .5rem .8rem; overflow-x: auto }}
.prompt, .anchor-link {{ display: none }}
.highlight {{ background: #f5f6f8; border-left: 3px solid #c5cad3; margin: .6rem 0 }}
.output pre {{ white-space: pre-wrap }}
.output_stderr {{ color: #667 }}
code {{ font-family: ui-monospace, monospace }}
img {{ max-width: 100% }}
.k, .kn, .kc, .ow {{ color: #7a2a8c }}
.s1, .s2, .sd, .sa, .si, .se {{ color: #2a6f2a }}
.c1, .ch, .cm {{ color: #667; font-style: italic }}
.mi, .mf {{ color: #1f4f9e }}
.nb, .bp {{ color: #00606b }}
.nf, .nc {{ color: #8a4b00 }}
</style>
</head>
<body>
{body}
</body>
</html>
"""

NOTEBOOK = CHECKOUT / "notebooks" / "compress_and_run.ipynb"


def execute(
    notebook: nbformat.NotebookNode, parameters: Mapping[str, Any], *, timeout: int | None = None
) -> nbformat.NotebookNode:
    """Runs all cells from the root of the checkout.

    Args:
      notebook: left as it is.
      parameters: values instead of those in the cell tagged "parameters".
      timeout: seconds a cell may take; None is no limit.

    Returns:
      A copy with outputs, and with the parameters in a cell tagged "injected-parameters".

    Raises:
      ValueError: a parameter that the notebook does not have.
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    executed = copy.deepcopy(notebook)
    inject_parameters(executed, parameters)

    client = nbclient.NotebookClient(
        executed,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(CHECKOUT)}},
        record_timing=False,
    )
    client.execute()
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy_outputs(cell.outputs)
    return executed


def tidy_outputs(outputs: Sequence[Any]) -> list[Any]:
    """Joins a cell's streams: first stderr as a terminal shows it at the end, then stdout.

    Progress bars move the cursor; a page would show each of their states.
    """
    streams = {"stderr": "", "stdout": ""}
    others = []
    for output in outputs:
        if output.output_type == "stream":
            streams[output.name] += output.text
        else:
            others.append(output)
    streams["stderr"] = final_screen(streams["stderr"])
    joined = [
        nbformat.v4.new_output("stream", name=name, text=text)
        for name, text in streams.items()
        if text
    ]
    return joined + others


def final_screen(text: str) -> str:
    """What a terminal of endless width shows after `text`, without empty lines and TensorFlow's.

    Of control characters those that progress bars use have an effect: carriage return, line feed,
    and ESC [A, which goes up a line.
    """
    lines: list[list[str]] = [[]]
    row = column = 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+|\x1b", text):
        if part == "\x1b[A":
            row = max(row - 1, 0)
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append([])
        else:
            line = lines[row]
            line += " " * (column - len(line))
            line[column : column + len(part)] = part
            column += len(part)
    shown = ("".join(line).rstrip() for line in lines)
    return "".join(f"{line}\n" for line in shown if line and not _TENSORFLOW_STARTS.match(line))


def inject_parameters(notebook: nbformat.NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Adds a cell with `parameters` behind the one tagged "parameters"; none if there are none.

    Raises:
      ValueError: a parameter that the notebook does not have.
    """
    (place,) = (
        index
        for index, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", ())
    )
    known = [
        target.id
        for statement in ast.parse(notebook.cells[place].source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(
            f"the notebook has no parameter {', '.join(unknown)}; it has {', '.join(known)}"
        )
    if parameters:
        source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        cell = nbformat.v4.new_code_cell(
            source, id="injected-parameters", metadata={"tags": ["injected-parameters"]}
        )
        notebook.cells.insert(place + 1, cell)


def source_digest(notebook: nbformat.NotebookNode) -> str:
    """sha256 of all cells' types and sources: what a page was made from."""
    cells = [[cell.cell_type, cell.source] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def render(executed: nbformat.NotebookNode, digest: str) -> str:
    """One self-contained page that names what it was made from.

    Args:
      executed: a notebook with outputs.
      digest: `source_digest` of the notebook as it is kept.

    Raises:
      ValueError: an output names a folder of this machine.
    """
    from nbconvert import HTMLExporter

    # "basic" is the cells alone: no scripts, and the style is ours.
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(executed)
    page = _PAGE.format(title=html.escape(_title(executed)), digest=digest, body=body)
    for folder in (str(CHECKOUT), str(Path.home()), sys.prefix):
        if found := re.search(rf".*{re.escape(folder)}/.*", page):
            raise ValueError(
                f"outputs name a folder of this machine ({found[0].strip()[:300]}); print paths "
                "relative to the checkout"
            )
    return page


def _title(notebook: nbformat.NotebookNode) -> str:
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK, help="(default: the only one)")
    parser.add_argument("--html", type=Path, help="page to write (default: beside the notebook)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the notebook; VALUE is Python, so strings need quotes",
    )
    arguments = parser.parse_args(argv)
    notebook = nbformat.read(arguments.notebook, as_version=4)
    parameters = {}
    for setting in arguments.set:
        name, separator, value = setting.partition("=")
        try:
            parameters[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            separator = ""
        if not separator:
            parser.error(f"--set {setting}: write NAME=VALUE, strings in quotes: SOURCE=\"'demo'\"")
    try:
        executed = execute(notebook, parameters)
        page = render(executed, source_digest(notebook))
    except ValueError as error:
        parser.error(str(error))
    path = arguments.html or arguments.notebook.with_suffix(".html")
    with open_atomically(path) as file:
        file.write(page.encode())
    print(path)


if __name__ == "__main__":
    main()
