"""Other engines beside ours, each in a process of its own: `gossamer bench MODEL --engine llama.cpp,vllm`.

    peers         the engines: where the Python of each is, which models it opens, how it is installed
    entries       a model in an engine as a row to be: the job that measures it, the records that come of it
    loop          what runs in a peer's Python: the lines of worker.py, over one of the files below
    transformers  llama_cpp  openvino  vllm      one engine each
    url           any OpenAI-compatible server

A peer is never a dependency: it lives in an environment of its own, and its Python runs `loop.py` as a plain script.
So `loop` and the files of the engines import nothing of this package, and their libraries only when they are run.
A file of an engine has

    LIBRARIES     modules that are imported before memory is first read; the version of the last stands in the record
    Engine(job)   loads `job["model"]` for `batch` sequences of `context` tokens on so many `threads`

and an Engine has

    facts           {"dtype", "kv_cache", "kv_element_bytes"}; what it does not tell is None
    reserved_bytes  memory set aside for keys and values beforehand, used or not; None if it does not tell
    run(prompts, output_tokens)   seconds to the first token of every prompt, and from there to the last
    nll(window, scored)           negative log-likelihood, summed, of the last `scored` tokens of a window

Tokens are chosen greedily and end tokens ignored; nothing computed for one run may be used in another.
"""
