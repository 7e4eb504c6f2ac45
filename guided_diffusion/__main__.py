"""``python -m guided_diffusion COMMAND``; the scripts and ``guided-diffusion`` start here, too."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before a command begins, and after it

from guided_diffusion.commands import main  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    main()
