"""Speculative decoding: cheap guesses at the next tokens, verified together in one step of the model.

    speculator   whether, how many, and what it was worth; the only part that the engine sees
    ngram        guesses what followed the last time that these tokens stood here
    draft_model  guesses with a smaller model, or with a compressed form of the same one

What comes out is what would have come without: a step draws at every drafted position with the request's own params and
noise, and goes on as far as the drafts agree (Leviathan et al., arXiv 2211.17192, with the coupling of Gumbel noise
instead of rejection: a draft that shares the noise agrees wherever its distribution leads to the same token).
"""

from .speculator import Drafter, Speculator

__all__ = ["Drafter", "Speculator"]
