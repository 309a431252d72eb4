"""Floating-point operations of training, counted from the configuration."""

from __future__ import annotations

from kabrn_dist.config import ModelConfig


def flops_per_token(config: ModelConfig, sequence_length: int, active_parameters: int) -> float:
    """Return the floating-point operations of one token in forward and backward.

    The sum of two terms, a multiplication and an addition counting as two operations:

    - 6 · N for N active parameters: 2 in forward, 4 in backward (Kaplan et al., arXiv 2001.08361, §2.1);
    - the mixing of tokens, for each layer with H heads of key width K and value width V: 3 · H · T · (K + V) for
      attention over T tokens, of which the causal mask keeps half; 3 · H · (C · (K + V) + 4 · K · V) for retention in
      chunks of C tokens, the second part being the state's update and its use.

    Recomputed activations and the exchange between ranks do not count: these are the operations the model needs, not
    those that are done.

    Args:
        config: the `model` section.
        sequence_length: T.
        active_parameters: N, parameters that one token passes through (`ParameterCounts.active`).
    """
    mixer = config.retention
    heads, widths, products = mixer.num_heads, mixer.key_dim + mixer.value_dim, mixer.key_dim * mixer.value_dim
    attention = 3 * heads * sequence_length * widths
    retention = 3 * heads * (min(mixer.chunk_size, sequence_length) * widths + 4 * products)
    mixing = sum(retention if kind == "R" else attention for kind in config.layers)
    return 6.0 * active_parameters + mixing
