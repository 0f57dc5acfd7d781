"""Pruning: one file per method; `structure.py` chooses what goes, `cut.py` is the model without it."""
