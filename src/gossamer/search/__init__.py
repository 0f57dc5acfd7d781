"""Which recipe is the best for a purpose, found by making and measuring: studies over many recipes.

    study_precision  every number format on one model: size, speed at several batch sizes, divergence

Knows recipes and measurements; knows no command line and no report. Imports nothing heavy by itself.
"""
