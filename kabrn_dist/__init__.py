"""MixKABRN: distributed training of Mixtures of Kolmogorov-Arnold Bit Retentive Networks.

The names below are imported when they are first used; `import kabrn_dist` alone imports no torch.

Example:
    import kabrn_dist as mk

    config = mk.load_config("configs/tiny.yaml", ["training.steps=50"])
    model, tokenizer = mk.load_model("runs/tiny")
    for piece in model.generate("Once", tokenizer=tokenizer):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kabrn_dist.data.run_config import load_run_config as load_config
    from kabrn_dist.inference.run import Run, load_model
    from kabrn_dist.train.trainer import Trainer
    from kabrn_dist.utils.errors import UserError

__version__ = "0.2.0"
__all__ = ["Run", "Trainer", "UserError", "__version__", "load_config", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_config":
        from kabrn_dist.data.run_config import load_run_config

        return load_run_config
    if name in ("Run", "load_model"):
        from kabrn_dist.inference import run

        return getattr(run, name)
    if name == "Trainer":
        from kabrn_dist.train.trainer import Trainer

        return Trainer
    if name == "UserError":
        from kabrn_dist.utils.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
