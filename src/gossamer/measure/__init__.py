"""What a model costs and what it is worth: quality, speed and memory, each in a process of its own, as result records.

    run      models in, records out: what to call
    plans    the numbers that lay a measurement out
    corpus   texts to judge on, and the refusal of a text that calibrated the model
    quality  perplexity, KL divergence and agreement with a reference, over windows
    speed    prefill and decode tokens/s, time to first token
    samples  a few greedy answers
    memory   what the operating system says
    jobs     the two measurements as a worker process runs them
    worker   the process around a job; the only part that knows of processes
    records  the JSON lines that come out

Imports nothing heavy by itself.
"""
