"""Replicas of an engine under a trace of requests, without computing a token: `gossamer simulate`.

    cost      what a step costs: a line through measured steps
    trace     the requests: lengths, moments, what they share
    replica   the engine's own scheduler and blocks, with a clock that is told what a step took
    routing   which replica gets a request
    fleet     the events in order, and what they come to
    measure   the steps of a real engine, for the line

The schedule and the blocks are those of `engine`, the load and its numbers those of `measure/load`: what is simulated
is what runs. Imports nothing heavy by itself; only `measure` needs torch.
"""
