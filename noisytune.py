"""`import noisytune`: noisytune_cli under the shorter name, with its public names and no others."""

from typing import TYPE_CHECKING

from noisytune_cli import __all__, __dir__, __getattr__, __version__  # noqa: F401

if TYPE_CHECKING:
    from noisytune_cli import *  # noqa: F403

if __name__ == "__main__":
    from noisytune_cli.__main__ import main

    main()
