"""The network: retention, KAN experts, ternary matrices."""
