"""Pruning: one file per method; `masks.py` says which weights become zero, `structure.py` what else goes, `cut.py` is
the model without it."""
