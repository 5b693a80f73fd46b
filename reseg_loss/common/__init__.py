"""What every room uses: labels, outputs, inputs, states, files, dry forwards, processes."""
