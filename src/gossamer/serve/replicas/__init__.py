"""Several copies of a server on a Ray cluster behind one address: a front that answers HTTP, replicas that compute.

    front      the HTTP side: who may come in, which replica, another one where that is lost. Knows no Ray
    replica    one copy: the application of `serve/app.py` over engine workers of its own. Knows no Ray
    group      the other nodes of a copy whose model is on several
    router     which replica a prompt goes to: Ray Serve's seam, loaded by Ray Serve
    metrics    those of all replicas, in one
    deploy     starts and ends the replicas through Ray Serve, and asks them
    server     the whole: bind, deploy, serve, drain, remove

Ray Serve's own HTTP side (`@serve.ingress`) is not used. It routes before a body is read, so that it cannot know the
prompt, and a request whose replica dies is an error there, even if nothing of its answer has been sent.
"""
