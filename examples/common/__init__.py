"""What the example scripts share: data, training, metrics, plots."""
