"""What is used of Hypothesis, or an error that says how to get it."""

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "turboquant_np.testing.strategies and turboquant_np.testing.conformance need Hypothesis: "
        "pip install 'turboquant-np[testing]'"
    ) from error

__all__ = ["HealthCheck", "given", "settings", "st"]
