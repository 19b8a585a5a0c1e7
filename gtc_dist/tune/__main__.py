"""`python -m gtc_dist.tune`: search over settings."""

from gtc_dist.errors import run_command
from gtc_dist.tune.search_settings import main

run_command(main)
