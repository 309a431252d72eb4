"""What the sandbox can do on this machine, found by trying; and the sandbox, or a refusal."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kabrn_dist.evaluation.sandbox import SANDBOX_LAYERS, ProgramLimits, Sandbox, SandboxError


@dataclass(frozen=True)
class SandboxProbe:
    """What protects this machine from programs, found by trying.

    Attributes:
        layers: Layers that can be had.
        missing: Layer → why it cannot.
        escapes: What a program could do that it must not, with all layers that can be had.
    """

    layers: tuple[str, ...]
    missing: dict[str, str]
    escapes: tuple[str, ...]

    @property
    def is_safe(self) -> bool:
        """Whether files, network and processes are protected."""
        return not self.escapes

    def describe(self) -> str:
        """Return one line for the log and for messages."""
        text = f"programs run with {', '.join(self.layers) or 'no layer'}"
        text += "".join(f"; no {layer} ({why})" for layer, why in self.missing.items())
        return text + (f"; a program could {', '.join(self.escapes)}" if self.escapes else "")


def probe_sandbox(layers: Sequence[str] = SANDBOX_LAYERS) -> SandboxProbe:
    """Try each layer, and then what must be impossible with those that can be had.

    Args:
        layers: Layers to try; fewer to see what a machine without the others would say.
    """
    had: list[str] = []
    missing = {layer: "not tried" for layer in SANDBOX_LAYERS if layer not in layers}
    for layer in layers:
        try:
            outcome = Sandbox((layer,)).run("")
            if outcome.status == "passed":
                had.append(layer)
            else:
                missing[layer] = outcome.describe()
        except SandboxError as error:
            missing[layer] = error.reason.removeprefix(f"{layer}: ")
    return SandboxProbe(tuple(had), missing, _find_escapes(tuple(had)))


def _find_escapes(layers: tuple[str, ...]) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(prefix="mixkabrn-probe-") as folder:
        secret = Path(folder) / "secret"
        secret.write_text("secret", encoding="utf-8")
        program = _PROBE.replace("SECRET", repr(str(secret)))
        outcome = Sandbox(layers).run(program)
    done = outcome.output.splitlines()
    return tuple(done) if outcome.status == "passed" else (*done, f"not be probed ({outcome.describe()})")


_PROBE = """
import os, socket
def attempt(name, action):
    try:
        action()
    except OSError:
        return
    print(name)
def start():
    if os.fork() == 0:
        os._exit(0)
attempt("read files", lambda: open(SECRET).close())
attempt("write files", lambda: open(SECRET + ".new", "w").close())
attempt("use the network", lambda: socket.socket().close())
attempt("start processes", start)
attempt("send signals", lambda: os.kill(os.getppid(), 0))
"""


def open_sandbox(limits: ProgramLimits | None = None, layers: Sequence[str] = SANDBOX_LAYERS) -> Sandbox:
    """Return a sandbox with all layers that this machine has.

    Args:
        limits: Of each program; None for the defaults.
        layers: As for `probe_sandbox`.

    Raises:
        SandboxError: if they do not keep programs from files, the network and other processes.
    """
    probe = probe_sandbox(layers)
    if not probe.is_safe:
        raise SandboxError(f"programs of a model cannot be run safely here: {probe.describe()}")
    return Sandbox(probe.layers, limits or ProgramLimits())
