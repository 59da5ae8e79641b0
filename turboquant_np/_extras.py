"""The one error for a package that is an extra and not installed."""

from __future__ import annotations


def missing_extra(module: str, extra: str, error: ImportError) -> ImportError:
    """The error to raise from `error`: it names the package's extra.

    Parameters
    ----------
    module : str
        What was imported, for example "turboquant_np.zarr".
    extra : str
        The extra that brings what it needs.
    error : ImportError
        What its own import raised.
    """
    return ImportError(
        f"{module} needs {error.name or extra}: pip install 'turboquant-np[{extra}]'",
        name=error.name,
    )
