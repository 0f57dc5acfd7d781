"""Arithmetic on stored weights: `dispatch` chooses, `cpu` is C++, `reference` is plain torch and the oracle.

Knows arrays, bits and groups; knows no model, no file and no format by name. Nothing is imported here: the extension
is loaded by the first call that needs it.
"""
