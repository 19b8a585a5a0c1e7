"""`python -m gtc_dist.init`: a configuration for a folder of files."""

from gtc_dist.errors import run_command
from gtc_dist.init.write_config import main

run_command(main)
