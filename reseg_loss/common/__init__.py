"""Shared by all packages here: labels, outputs, inputs, states, files, dry forwards, processes."""
