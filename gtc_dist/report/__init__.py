"""A page on a run: `gtc report`."""
