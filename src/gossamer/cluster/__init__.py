"""Ray clusters: how a command joins one, and has its work done there. Replicas of a server are in `serve/replicas/`."""
