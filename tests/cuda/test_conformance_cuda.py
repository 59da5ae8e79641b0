"""The cuda backend passes the conformance suite."""

from __future__ import annotations

from typing import Any

import pytest

from turboquant_np.testing.conformance import BackendConformance
from turboquant_np.testing.strategies import DEVICE_LAYOUTS


@pytest.mark.cuda
class TestCuda(BackendConformance):
    backend = "cuda"
    layouts = DEVICE_LAYOUTS

    def to_device(self, array: Any) -> Any:
        import cupy

        return cupy.asarray(array)
