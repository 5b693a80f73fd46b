"""Taps: what they are, and how they are found in any U-shaped model."""
