/* eˣ and the logistic function of a vector. After lanes.h. */

/* eˣ for x within ±87, and that of the nearer end beyond; to 3e-7 of itself. NaN stays. */
INLINE vec exponential(vec x) {
    x = pick(x > 87.0f, all(87.0f), pick(x < -87.0f, all(-87.0f), x));
    /* eˣ = 2ⁿ·eʳ, |r| ≤ ln 2 / 2. Beside 1.5·2²³ n stands in the last bits, from where it is shifted to an exponent's
     * place. ln 2 is taken off in two parts, of which the first has few enough bits for an exact product. */
    vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = (((((r * (1.0f / 720) + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r + 1.0f) * r + 1.0f;
    return (vec)((uvec)p + ((uvec)shifted << 23));
}

/* At least e⁻⁸⁷, so that no number here is subnormal, which would be slow. */
INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }
