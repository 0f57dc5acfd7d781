"""Artifacts for other engines, each with the proof that what was written reads back as what was meant."""
