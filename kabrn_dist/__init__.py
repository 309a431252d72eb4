"""MixKABRN: distributed training of Mixtures of Kolmogorov-Arnold Bit Retentive Networks."""
