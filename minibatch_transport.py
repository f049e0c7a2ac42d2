"""The distribution of `mbot`, `flows` and `setenc`: its version, and how a name of theirs is retired."""

import sys
import warnings

__version__ = "0.2.0"

_OURS = {"minibatch_transport", "mbot", "flows", "setenc"}


def warn_deprecated(old: str, instead: str, *, removal: str) -> None:
    """Warn, at the user's own line, that a name or a setting goes.

    The rule (RELEASING.md): what is public works with this warning through a minor version, and is removed in the next.

    Args:
        old: what was used, such as ``"MiniBatchOT(debias=…)"``.
        instead: what to write, such as ``"debiased=…"``.
        removal: the version without it.

    >>> with warnings.catch_warnings(record=True) as told:
    ...     warn_deprecated("f(size=…)", "f(n=…)", removal="0.4.0")
    >>> str(told[0].message)
    'f(size=…) is deprecated and goes in version 0.4.0: use f(n=…)'
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
    warnings.warn_explicit(
        f"{old} is deprecated and goes in version {removal}: use {instead}",
        FutureWarning,  # Python shows it without being asked
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
