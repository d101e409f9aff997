"""Packages that can be called, so that `from orpo import audit` gives the one thing and its parts at once."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package whose call is that of its function `called`. Its name cannot be the function's: importing a part would replace it."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.called(*args, **options)

    def __repr__(self) -> str:
        return f"<callable package {self.__name__!r}>"


def make_callable(package: str, function: Any) -> None:
    """Let a package be called."""
    module = sys.modules[package]
    module.__dict__["called"] = function
    module.__dict__["__wrapped__"] = function  # what help() and inspect.signature look at
    module.__class__ = CallablePackage
