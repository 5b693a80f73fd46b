"""Taking features out of a model while it trains."""
