"""What `gossamer plan` says of speed: the machines that were described, or this one, and the steps they would take."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..formats import Format
    from ..model import ModelConfig
    from ..parallel import Plan as Cut
    from ..parallel.roofline import Link, Node, Stage, Step

LINK_GBPS, LINK_LATENCY_US = 10.0, 50.0
"""Between machines, where nothing else is said: Ethernet of ten gigabits, TCP through the kernel."""
SHARED_LATENCY_S = 5e-6
"""Of a message between processes of one machine: assumed (benchmarks/bench_parallel.py measures a whole sum)."""
KV_ELEMENT_BYTES = 2
"""The cpu backend's own choice, bfloat16."""


@dataclass(frozen=True)
class Machines:
    """The options that describe them, checked. Raises UsageError."""

    nodes: int = 1
    link_gbps: float | None = None
    link_latency_us: float | None = None
    memory_gbps: float | None = None
    compute_gmacs: float | None = None

    def __post_init__(self) -> None:
        for name in ("link_gbps", "link_latency_us", "memory_gbps", "compute_gmacs"):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{option} is {value:g}, must be above 0")
            if value is not None and name.startswith("link") and self.nodes == 1:
                raise UsageError(f"{option} is of the network between machines", hint="give --nodes 2 or more")

    def node(self, integer: bool) -> Node:
        """One of them; what was not said is measured on this one. Raises KernelError where there are no kernels."""
        from ..kernels.limits import product_limit, read_limit
        from ..parallel.roofline import Node
        from ..settings import threads

        return Node(
            read_limit(threads()) if self.memory_gbps is None else self.memory_gbps * 1e9,
            product_limit(threads(), integer) if self.compute_gmacs is None else self.compute_gmacs * 1e9,
        )

    @property
    def between(self) -> Link:
        """What joins two of them."""
        from ..parallel.roofline import Link

        gbps = LINK_GBPS if self.link_gbps is None else self.link_gbps
        latency_us = LINK_LATENCY_US if self.link_latency_us is None else self.link_latency_us
        return Link(gbps * 1e9 / 8, latency_us / 1e6)


def speed(
    config: ModelConfig, forms: dict[str, Format], cut: Cut | None, machines: Machines, batch: int, context: int
) -> dict[str, Any]:
    """Steps of one sequence and of `batch`, as rows of JSON; `cut`: None for a model in one process."""
    from ..parallel.roofline import Link, estimate, place

    stages = _whole(config, forms) if cut is None else cut.stages(forms, KV_ELEMENT_BYTES)
    homes = place(sum(len(stage.ranks) for stage in stages), machines.nodes)
    node = machines.node(_mostly_coded(config, forms))
    inside, between = Link(node.bytes_per_s, SHARED_LATENCY_S), machines.between
    steps = [
        estimate(stages, 4 * config.hidden_size, homes, node, inside, between, sequences, context)
        for sequences in dict.fromkeys((1, batch))
    ]
    return {
        "nodes": machines.nodes,
        "memory_gbytes_per_s": round(node.bytes_per_s / 1e9, 3),
        "compute_gmacs": round(node.macs_per_s / 1e9, 3),
        "link_gbits_per_s": between.bytes_per_s * 8 / 1e9 if machines.nodes > 1 else None,
        "link_latency_us": between.latency_s * 1e6 if machines.nodes > 1 else None,
        "steps": [_row(step) for step in steps],
    }


def _row(step: Step) -> dict[str, Any]:
    parts = {f"{name}_s": value for name, value in asdict(step).items() if name != "batch"}
    return {
        "batch": step.batch,
        "tokens_per_s": step.tokens_per_s,
        "step_s": step.seconds,
        **parts,
        "bottleneck": step.bottleneck,
    }


def _whole(config: ModelConfig, forms: dict[str, Format]) -> tuple[Stage, ...]:
    """A model that nothing cuts: families that cannot be cut have a speed as well."""
    from ..model.families import tensor_names
    from ..parallel.plan import step_work
    from ..parallel.roofline import Stage

    nbytes = {name: forms[name].nbytes(shape) for name, shape in tensor_names(config).items()}
    return (Stage((step_work(config, nbytes, True, KV_ELEMENT_BYTES),), 0),)


def _mostly_coded(config: ModelConfig, forms: dict[str, Format]) -> bool:
    """True if most weights are codes, which meet activations rounded to bytes."""
    from ..formats import Dense
    from ..model.families import tensor_names

    sizes = {name: math.prod(shape) for name, shape in tensor_names(config).items()}
    coded = sum(size for name, size in sizes.items() if not isinstance(forms[name], Dense))
    return 2 * coded > sum(sizes.values())
