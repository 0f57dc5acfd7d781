"""Ray clusters: how a command joins one. What runs there is in `search/on_ray.py` and `serve/replicas/`."""
