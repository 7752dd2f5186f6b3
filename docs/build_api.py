"""Builds the API reference from the docstrings; a warning is an error.

    python docs/build_api.py build/api

Left out is `qmoe_jax.t5x_plugin`, which can be imported only where T5X is installed.
"""

import argparse
import warnings
from pathlib import Path


def build(output: Path) -> int:
    """Write the pages; return their number.

    Raises:
      Warning: a module that cannot be imported, or a docstring that cannot be read.
    """
    import pdoc
    from pdoc import render

    import qmoe_jax

    # The public names are shown where they are defined. With __all__ pdoc would take `compress`
    # for the function alone, and look for no other modules than those named there.
    del qmoe_jax.__all__
    render.configure(docformat="google", footer_text=f"qmoe-jax {qmoe_jax.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Modules import others; what those warn of is theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pdoc.pdoc("qmoe_jax", "!qmoe_jax.t5x_plugin", output_directory=output)
    return len(list(output.rglob("*.html")))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for the pages")
    output = parser.parse_args().output
    print(f"{build(output)} pages; begin at {output / 'qmoe_jax.html'}")


if __name__ == "__main__":
    main()
