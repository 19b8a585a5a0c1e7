"""`python -m gtc_dist.report`: a page on a run."""

from gtc_dist.errors import run_command
from gtc_dist.report.write_report import main

run_command(main)
