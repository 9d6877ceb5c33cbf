"""Named sizes of the transformer: arguments of `WanTransformer`."""

from __future__ import annotations

from typing import Any

ZOO: dict[str, dict[str, Any]] = {
    "1.3b": {},  # Wan2.1-T2V-1.3B is what WanTransformer's defaults say
    "14b": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "miniature": {
        "dim": 128,
        "ffn_dim": 384,
        "num_heads": 4,
        "num_layers": 6,
        "text_dim": 64,
        "text_len": 32,
        "freq_dim": 128,
        "rope_theta": 100.0,
    },
}


def arguments(name: str) -> dict[str, Any]:
    """Constructor arguments of a named size. Raises ValueError for an unknown name."""
    if name not in ZOO:
        raise ValueError(f"model size {name!r} is unknown; choose from {', '.join(ZOO)}")
    return ZOO[name]
