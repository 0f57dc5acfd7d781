"""What a decoder-only transformer looks like, layer by layer. Knows no file format and no tensor.

Every layer has its own shape, so a pruned model is a config with smaller numbers and runs wherever the Decoder runs.
"Auto" values are resolved by the family (`translate.py`) before a config exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu"]
NormKind = Literal["rms", "layer"]
Positions = Literal["rotary", "learned", "alibi"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions (RoFormer, arXiv 2104.09864) and the scalings that checkpoints carry."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    share: float = 1.0
    """Of each head's columns, the first so many are turned."""

    def width(self, head_dim: int) -> int:
        """Columns of a head that are turned."""
        return int(head_dim * self.share)


@dataclass(frozen=True)
class LayerConfig:
    """One block: grouped-query attention and a feed-forward network, gated or plain."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    biases: frozenset[str] = frozenset()
    """Roles of the linear layers that add a bias."""
    gated: bool = True
    window: int | None = None
    """Tokens that a token sees, itself included; None: all before it."""
    rope: Rope | None = None
    """Rotary positions of its own, where they are not the model's."""
    qk_norm: bool = False
    """Each head's query and key is normed before it is turned."""
    post_norms: bool = False
    """What attention and feed-forward network add to the residual stream is normed."""

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
        shapes = {
            "q": (self.q_size, hidden_size),
            "k": (self.kv_size, hidden_size),
            "v": (self.kv_size, hidden_size),
            "o": (hidden_size, self.q_size),
            "gate": (self.ffn_width, hidden_size),
            "up": (self.ffn_width, hidden_size),
            "down": (hidden_size, self.ffn_width),
        }
        return shapes if self.gated else {role: shape for role, shape in shapes.items() if role != "gate"}

    def norm_sizes(self, hidden_size: int) -> dict[str, int]:
        """Role of each norm -> size."""
        sizes = {"attn_norm": hidden_size, "ffn_norm": hidden_size}
        if self.post_norms:
            sizes |= {"attn_post_norm": hidden_size, "ffn_post_norm": hidden_size}
        if self.qk_norm:
            sizes |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        return sizes

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
    positions: Positions = "rotary"
    position_offset: int = 0
    """Of learned positions: rows of their table before the one of position 0."""
    norm: NormKind = "rms"
    norm_offset: float = 0.0
    """What is added to the stored weight of an RMS norm."""
    parallel: bool = False
    """The feed-forward network reads the block's input, not what attention made of it."""
    embed_norm: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    """Of scores, before the softmax; None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    """softcap * tanh(x / softcap) bounds scores and logits."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def rope_of(self, layer: LayerConfig) -> Rope | None:
        """Rotary positions of a layer; None if positions are not rotary."""
        return (layer.rope or self.rope) if self.positions == "rotary" else None

    def model_norms(self) -> tuple[str, ...]:
        """Roles of the norms outside of the blocks."""
        return ("embed_norm", "final_norm") if self.embed_norm else ("final_norm",)

    def kv_elements_per_token(self) -> int:
        """Numbers that the key-value cache holds for each token of context, over all layers."""
        return sum(2 * layer.kv_size for layer in self.layers)
