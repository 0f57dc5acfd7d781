"""A backend whose weights lie with several processes: the view of a rank's weights, a rank's part of a step, and the
backend that launches the ranks, hands them each step, and watches them.
"""
