"""``python -m guided_diffusion COMMAND``: the console command without an installation."""

from guided_diffusion.commands import main

if __name__ == "__main__":
    main()
