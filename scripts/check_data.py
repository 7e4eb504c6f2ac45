"""Look at a data set as training would, and list everything that is wrong with it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.options.parser import parse
from guided_diffusion.options.tools import CHECK


def main() -> None:
    with exit_on_user_error():
        typed = parse(__doc__ or "", CHECK)
        # torch is imported only once flags are read
        from guided_diffusion.commands import check

        check(typed)


if __name__ == "__main__":
    main()
