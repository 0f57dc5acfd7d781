"""An OpenAI-compatible HTTP server over the engine: one process answers HTTP, each model has a worker process.

    messages    what the two sides say to each other, and the pipe
    worker      the process that holds weights and runs the engine, step after step
    client      the server's side of one worker: requests in, outputs back, watched and restarted
    protocol    the JSON of requests and responses
    sampling    from a request to SamplingParams
    tools       tool calls: into prompts and grammars, and out of answers
    admission   who may come in: a bounded queue, and what a body and a client may take
    answers     from an engine's outputs to JSON, whole or in chunks
    service     what the routes do
    transport   JSON, server-sent events, clients that go away, the API key
    metrics     what Prometheus reads
    app         the routes
    server      the whole: bind, start, serve, drain, exit

Nothing is imported here: `gossamer --help` must stay quick.
"""
