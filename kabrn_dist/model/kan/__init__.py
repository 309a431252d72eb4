"""KAN experts: Kolmogorov-Arnold networks d → h → d with learnable univariate functions, and their controls."""
