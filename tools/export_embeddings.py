"""The same as `python -m gtc_dist.export`."""

from gtc_dist.errors import run_command
from gtc_dist.export import main

if __name__ == "__main__":
    run_command(main)
