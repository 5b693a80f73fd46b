"""What `benchmarks/accuracy.py` is made of: data and splits, batches, variants, training, metrics, plans."""
