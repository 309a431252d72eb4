"""What text can be asked for, checked without torch."""

from __future__ import annotations

from kabrn_dist.utils.errors import UserError

# Beyond it, all tokens are as likely or all but one impossible, and quotients leave fp32's range.
TEMPERATURES = (1e-4, 1e4)


def check_sampling(prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Check what `GenerativeModel.generate` is asked for.

    Raises:
        UserError: for the first value that has no meaning.
    """
    least, most = TEMPERATURES
    if tokens < 0:
        raise UserError(f"tokens {tokens}: a number of tokens is not negative; use 0 or more, such as 200")
    if temperature != 0 and not least <= temperature <= most:
        raise UserError(f"temperature {temperature:g}: use 0 for the likeliest token, or {least:g} to {most:g}")
    if top_k < 0:
        raise UserError(f"top_k {top_k}: a number of tokens is not negative; use 0 to draw among all")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed}: use 0 to {2**63 - 1}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        shown = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")[:60]
        raise UserError(f"prompt {shown!r}: not UTF-8; set the terminal to UTF-8, or convert the text") from None
