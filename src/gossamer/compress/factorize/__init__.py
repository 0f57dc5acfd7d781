"""Methods that store a matrix as factors: one file each, what they share is `rank.py`."""
