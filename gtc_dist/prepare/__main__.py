"""`python -m gtc_dist.prepare`: raw tables to a catalog."""

from gtc_dist.errors import run_command
from gtc_dist.prepare.build_catalog import main

run_command(main)
