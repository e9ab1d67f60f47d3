"""Drop-in faces of other packages' call signatures: a user changes the import line."""

from finecf.compat import smdl_attribution

__all__ = ["smdl_attribution"]
