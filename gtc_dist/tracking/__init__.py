"""What a run shows while it trains: charts, and the services that show them."""
