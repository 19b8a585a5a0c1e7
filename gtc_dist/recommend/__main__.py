"""`python -m gtc_dist.recommend`: lists of items for users, or similar items."""

from gtc_dist.errors import run_command
from gtc_dist.recommend.lists import main

run_command(main)
