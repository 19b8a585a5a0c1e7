"""`python -m gtc_dist.features`: texts and pictures to feature vectors."""

from gtc_dist.errors import run_command
from gtc_dist.features.encode_items import main

run_command(main)
