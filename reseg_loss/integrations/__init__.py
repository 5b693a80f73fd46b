"""Glue for frameworks that own the training loop, each module importing its own: see README.md beside this file."""
