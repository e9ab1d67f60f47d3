"""The command line: `finecf demo | explain | evaluate | train | bench | doctor`."""

from finecf.cli._commands import app

__all__ = ["app"]
