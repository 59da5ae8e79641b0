"""For tests of code that quantises: exact comparison, Hypothesis strategies, backend conformance.

`assert_bits_equal` needs NumPy only.  `turboquant_np.testing.strategies` and
`turboquant_np.testing.conformance` need Hypothesis: ``pip install 'turboquant-np[testing]'``.
"""

from ._bits import assert_bits_equal

__all__ = ["assert_bits_equal"]
