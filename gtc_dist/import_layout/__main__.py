"""`python -m gtc_dist.import_layout`: tables and a configuration from a folder of a public layout."""

from gtc_dist.errors import run_command
from gtc_dist.import_layout.import_folder import main

run_command(main)
