"""The command line's parser: a mistake is one line with a remedy, without the usage that nobody reads before it."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from kabrn_dist.utils.errors import UserError


class _MissingError(UserError):
    """A required argument is missing."""


class CommandParser(argparse.ArgumentParser):
    """A parser of one command, whose mistakes are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        kind = _MissingError if "required" in message else UserError
        raise kind(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is not known where the command is known: there its own flags can be named."""
        try:
            found, unknown = super().parse_known_args(args, namespace)
        except _MissingError as error:
            # What is missing may be there, behind a flag that does not exist.
            unknown = [word for word in args or () if word.startswith("--") and not self._knows(word)]
            if not unknown:
                raise UserError(str(error)) from None
        if unknown:
            self.error(self._explain_unknown(unknown))
        return found, unknown

    def _knows(self, flag: str) -> bool:
        return any(known.startswith(flag.partition("=")[0]) for known in self._option_string_actions)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        # A command needs no name before it.
        flag = action if action.option_strings else None
        raise argparse.ArgumentError(flag, f"{value!r} is none of {', '.join(known)}{_did_you_mean(str(value), known)}")

    def _explain_unknown(self, unknown: Sequence[str]) -> str:
        flag = next((word for word in unknown if word.startswith("-")), "")
        setting = next((word for word in unknown if "=" in word and "." in word.partition("=")[0]), "")
        if not flag and setting and "--set" in self._option_string_actions:
            return f"{setting}: more than the command takes; did you mean --set {setting}?"
        if not flag:
            return f"{' '.join(unknown)}: more than the command takes; quote a text with spaces"
        name, equals, value = flag.partition("=")
        after = unknown[unknown.index(flag) + 1 :][:1]
        value = value if equals else " ".join(word for word in after if not word.startswith("-"))
        return f"unknown option {name}{self._suggest(name, value)}"

    def _suggest(self, flag: str, value: str) -> str:
        name = flag.lstrip("-").replace("-", "_")
        for action in self._get_positional_actions():
            metavar = str(action.metavar or action.dest)
            if name.upper() in metavar.upper().split("|"):
                return f"; give {metavar} without it"
        near = _did_you_mean(flag, self._option_string_actions)
        if not any(action.dest == "config" for action in self._actions):
            return near
        # Pydantic is worth its time only now.
        from kabrn_dist.config import Config
        from kabrn_dist.utils.mistakes import find_nearest_key
        from kabrn_dist.utils.yaml_section import list_keys

        key = find_nearest_key(name, list_keys(Config))
        is_key = key is not None and (not near or key.rpartition(".")[2] == name)
        return f"; did you mean --set {key}={value or '…'}?" if is_key else near


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
