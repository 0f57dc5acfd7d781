"""How far a student is from its teacher: errors of hidden states, divergences of next-token distributions.

Plain functions of tensors, each with the gradient that torch gives it. Knows no model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """|y - t|^2 / |t|^2 over the last axis: [..] of states [.., hidden].

    Relative to each token: a few of them carry activations hundreds of times larger than all others, and what reads the
    stream normalizes it.
    """
    size = target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (y - target).square().sum(-1) / size


def cosine_distance(y: Tensor, target: Tensor) -> Tensor:
    """1 - cos(y, t) over the last axis: what is left of an error once lengths do not count."""
    return 1 - F.cosine_similarity(y, target, dim=-1)


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || q) over the last axis of logits [.., vocabulary] / T (Hinton et al., arXiv 1503.02531): covers p."""
    p, q = _logs(teacher, student, temperature)
    return temperature**2 * _kl(p, q)


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q || p) (MiniLLM: Gu et al., arXiv 2306.08543): keeps to what p finds likely."""
    p, q = _logs(teacher, student, temperature)
    return temperature**2 * _kl(q, p)


def jensen_shannon(teacher: Tensor, student: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """T^2 (b KL(p || m) + (1 - b) KL(q || m)), m = b p + (1 - b) q (GKD: Agarwal et al., arXiv 2306.13649)."""
    p, q = _logs(teacher, student, temperature)
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return temperature**2 * (beta * _kl(p, m) + (1 - beta) * _kl(q, m))


def _logs(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q) of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)
