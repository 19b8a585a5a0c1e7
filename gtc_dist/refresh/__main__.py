"""`python -m gtc_dist.refresh`: today's embeddings from yesterday's run."""

from gtc_dist.errors import run_command
from gtc_dist.refresh.refresh_run import main

run_command(main)
