"""Every flag of every script, as frozen dataclasses, and how a command line is read."""
