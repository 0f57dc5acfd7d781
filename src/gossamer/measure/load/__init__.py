"""A load on an OpenAI-compatible server, and what each request had to wait: `gossamer bench serve`.

    plan      the numbers that lay a load out
    target    the server: its addresses, its model, how it counts tokens
    prompts   what is asked: lines of a file, or random words of a wanted length
    wire      one request over one connection, every arrival with its time
    answer    what those arrivals say: the moments of tokens, the counts, or why it failed
    send      all requests, so many at once or at random moments
    stats     answers to rates and percentiles; numbers only
    measure   from a plan to a record: what to call

Knows no engine: a server is known by its URL alone, ours like any other. Imports nothing heavy by itself.
"""
