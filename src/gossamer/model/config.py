"""What a decoder-only transformer looks like, layer by layer. Knows no file format and no tensor.

Every layer has its own shape, so a pruned model is a config with smaller numbers and runs wherever the Decoder runs.
"Auto" values are resolved by the family (`families.py`) before a config exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions (RoFormer, arXiv 2104.09864) and the scalings that LLaMA checkpoints carry."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LayerConfig:
    """One block: grouped-query attention and a gated feed-forward network."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    biases: frozenset[str] = frozenset()
    """Roles of the linear layers that add a bias."""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    def linear_shapes(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """Role of each linear layer -> weight shape [out_features, in_features]."""
        return {
            "q": (self.q_size, hidden_size),
            "k": (self.kv_size, hidden_size),
            "v": (self.kv_size, hidden_size),
            "o": (hidden_size, self.q_size),
            "gate": (self.ffn_width, hidden_size),
            "up": (self.ffn_width, hidden_size),
            "down": (hidden_size, self.ffn_width),
        }

    def has_bias(self, role: str) -> bool:
        return role in self.biases


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: embedding, blocks, final norm, head (tied to the embedding or not)."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    rope: Rope
    activation: Activation
    tie_embeddings: bool
    max_positions: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kv_elements_per_token(self) -> int:
        """Numbers that the key-value cache holds for each token of context, over all layers."""
        return sum(2 * layer.kv_size for layer in self.layers)
