"""What the error of TurboQuant is, exactly: the numbers that measurements are compared with."""

from __future__ import annotations

from .codebook import cell_moments, get_theory_bounds, unit_variance_centroids

__all__ = ["expected_mse", "get_theory_bounds"]


def expected_mse(d: int, bits: int) -> float:
    """Expected squared error D(d, b) of a unit vector under a Haar rotation, scale "norm".

    With a Haar rotation every unit vector becomes uniform on the sphere, whatever it was, so
    ``E ||x - decode(encode(x))||^2 = ||x||^2 D(d, b)`` exactly, for each fixed x.  D is d times the
    expected squared error of one coordinate under its exact density (arXiv:2504.19874, lemma 1)
    with the codebook of the format.

    Parameters
    ----------
    d : int
        Dimension, at least 2.
    bits : int
        Bits per coordinate, 1 to 8.

    Returns
    -------
    float
        Squared error relative to the squared norm.

    Raises
    ------
    ValueError, TypeError
        If `d` or `bits` is out of range or not an integer.

    Examples
    --------
    >>> from turboquant_np.theory import expected_mse
    >>> [round(expected_mse(128, b), 5) for b in (1, 2, 3, 4)]
    [0.36089, 0.11601, 0.03398, 0.00932]
    """
    z = unit_variance_centroids(d, bits)
    mass, moment = cell_moments(d, (z[1:] + z[:-1]) / 2, exact=True)
    # E (z - c)^2 = E z^2 - 2 sum c E[z; cell] + sum c^2 P(cell), and E z^2 = 1
    return 1.0 - 2.0 * float(z @ moment) + float(z * z @ mass)
