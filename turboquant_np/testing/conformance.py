"""What every backend must do, as a class of tests to inherit from.

A backend that passes gives the bits that docs/format.md prescribes, which are those of the
``reference`` backend.  In a test module of yours::

    from turboquant_np.testing.conformance import BackendConformance

    class TestMyBackend(BackendConformance):
        backend = "my_backend"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from turboquant_np import TurboQuant, TurboQuantConfig
from turboquant_np._arrays import float_dtype
from turboquant_np._backend import load
from turboquant_np._spec import SCALE_KINDS
from turboquant_np.config import ROTATION_KINDS
from turboquant_np.packing import pack

from . import strategies
from ._bits import assert_bits_equal
from ._hypothesis import HealthCheck, given, settings, st

__all__ = ["BackendConformance", "varied_configs", "varied_vectors"]

# One Hypothesis test serves every subclass, which is what this health check warns of; a backend may
# compile for seconds.
_shared_by_subclasses = settings(
    suppress_health_check=[HealthCheck.differing_executors], deadline=None
)


def varied_configs(
    head_dims: Sequence[int] = strategies.HEAD_DIMS,
    bits: Sequence[int] = range(1, 9),
    *,
    every_combination: bool = False,
) -> Iterator[TurboQuantConfig]:
    """Settings that reach every branch of the format.

    Each head_dim with both rotations, where bit widths and scales take turns; or, if asked for,
    every combination.
    """
    for n, head_dim in enumerate(head_dims):
        for r, rotation in enumerate(ROTATION_KINDS):
            turns = [(bits[(3 * n + 5 * r) % len(bits)], SCALE_KINDS[(n + r) % 3])]
            for b, scale in product(bits, SCALE_KINDS) if every_combination else turns:
                yield TurboQuantConfig(
                    head_dim=head_dim, bits=b, rotation=rotation, scale=scale, seed=head_dim
                )


def varied_vectors(head_dim: int, rows: int, seed: int) -> npt.NDArray[np.float32]:
    """[rows, head_dim] vectors that reach every branch of the format.

    Gaussian ones at norms from subnormal to near the largest float32, sparse ones (whose rotated
    coordinates tie with thresholds), constant, alternating, one with an outlier, and zeros.
    """
    rng = np.random.Generator(np.random.PCG64([seed, head_dim]))
    x = rng.standard_normal((rows, head_dim)).astype(np.float32)
    kinds = np.arange(rows) % 12
    i = np.arange(head_dim)
    x[kinds == 1] = i == rng.integers(head_dim)  # one-hot
    x[kinds == 2] = (i == 0) - 1.0 * (i == head_dim - 1)  # two-hot
    x[kinds == 3] = 1.0
    x[kinds == 4] = 1.0 - 2.0 * (i % 2)
    x[kinds == 5, 0] *= 1000.0
    x[kinds == 6] = 0.0
    exponents = np.select(
        [kinds == kind for kind in (7, 8, 9, 10, 11)], [-140, 120, -31, 31, -64], 0
    )
    scaled: npt.NDArray[np.float32] = np.ldexp(x, exponents[:, None])
    return scaled


class BackendConformance:
    """Tests that compare a backend with the reference; inherit and set `backend`.

    Attributes
    ----------
    backend : str
        Name of the backend, built in or registered under the entry-point group
        ``turboquant_np.backends``.
    head_dims : sequence of int
    bits : sequence of int
    dtypes : sequence of str
        Input and output dtypes.
    every_combination : bool
        Whether to go through all head_dims, bits, rotations, scales and dtypes.  By default they
        take turns, which meets each of them but spares backends that compile for each setting.
    layouts : sequence of str
        Layouts of input; ``strategies.DEVICE_LAYOUTS`` are those that CuPy knows too.

    Notes
    -----
    For a backend that works on CuPy arrays override `to_device` with ``cupy.asarray``.
    """

    backend: str
    head_dims: Sequence[int] = strategies.HEAD_DIMS
    bits: Sequence[int] = range(1, 9)
    dtypes: Sequence[str] = ("float16", "float32", "float64")
    every_combination = False
    layouts: Sequence[str] = strategies.LAYOUTS

    def to_device(self, array: npt.NDArray[Any]) -> Any:
        """`array` in the memory where the backend works."""
        return array

    # -- helpers -----------------------------------------------------------------------------------

    def _pair(self, config: TurboQuantConfig) -> tuple[TurboQuant, TurboQuant]:
        """The backend's quantiser and the reference's, with the same settings."""
        mine, reference = (
            replace(config, backend=self.backend),
            replace(config, backend="reference"),
        )
        return TurboQuant(mine), TurboQuant(reference)

    def _settings(self) -> list[TurboQuantConfig]:
        every = self.every_combination
        return list(varied_configs(self.head_dims, self.bits, every_combination=every))

    def _output_dtypes(self, turn: int) -> Sequence[str]:
        return self.dtypes if self.every_combination else [self.dtypes[turn % len(self.dtypes)]]

    # -- the backend itself ------------------------------------------------------------------------

    def test_it_is_available_and_describes_itself(self) -> None:
        backend = load(self.backend)
        assert backend.name == self.backend
        assert backend.device in ("cpu", "cuda")
        assert backend.why_unavailable() is None
        facts = backend.describe()
        assert all(isinstance(key, str) and isinstance(facts[key], str) for key in facts)

    # -- bits --------------------------------------------------------------------------------------

    def test_every_setting_gives_the_reference_bits(self) -> None:
        for turn, config in enumerate(self._settings()):
            with _naming(config):
                mine, reference = self._pair(config)
                x = varied_vectors(config.head_dim, rows=37, seed=1)
                packed, norms = mine.encode(self.to_device(x))
                expected_packed, expected_norms = reference.encode(x)
                assert_bits_equal(norms, expected_norms)
                assert_bits_equal(packed, expected_packed)
                for dtype in self._output_dtypes(turn):
                    assert_bits_equal(
                        mine.decode(packed, norms, dtype=dtype),
                        reference.decode(expected_packed, expected_norms, dtype=dtype),
                    )

    def test_every_input_dtype_gives_the_reference_bits(self) -> None:
        for dtype in self.dtypes:
            for config in (
                TurboQuantConfig(head_dim=128, bits=4, scale="unbiased"),
                TurboQuantConfig(head_dim=96, bits=3, scale="mse"),
            ):
                with _naming(config, dtype):
                    mine, reference = self._pair(config)
                    x = varied_vectors(config.head_dim, rows=50, seed=2)
                    x = np.clip(x, -60_000, 60_000).astype(float_dtype(dtype))
                    packed, norms = mine.encode(self.to_device(x))
                    expected_packed, expected_norms = reference.encode(x)
                    assert_bits_equal(norms, expected_norms)
                    assert_bits_equal(packed, expected_packed)

    def test_every_code_decodes_to_the_reference_bits(self) -> None:
        for turn, config in enumerate(self._settings()):
            with _naming(config):
                mine, reference = self._pair(config)
                rng = np.random.Generator(np.random.PCG64(3))
                packed = pack(rng.integers(2**config.bits, size=(9, config.head_dim)), config.bits)
                norms = np.array([0, 1, -1, 1e-45, 1e-39, 3e38, 0.1, 7, 1e4], np.float32)
                for dtype in self._output_dtypes(turn):
                    assert_bits_equal(
                        mine.decode(self.to_device(packed), self.to_device(norms), dtype=dtype),
                        reference.decode(packed, norms, dtype=dtype),
                    )

    @given(data=st.data())
    @_shared_by_subclasses
    def test_any_array_gives_the_reference_bits(self, data: st.DataObject) -> None:
        some = self._settings() if self.every_combination else self._settings()[::6]
        config = replace(
            data.draw(st.sampled_from(some)),
            seed=data.draw(strategies.seeds()),
            hadamard_rounds=data.draw(st.sampled_from([3, 1, 2, 4, 16])),
        )
        shape = strategies.shapes(config.head_dim)
        x = data.draw(strategies.float_arrays(shape, dtypes=self.dtypes, layouts=["C"]))
        layout = data.draw(st.sampled_from(list(self.layouts)))
        mine, reference = self._pair(config)
        there = strategies.lay_out(self.to_device(x), layout)
        packed, norms = mine.encode(there, check_finite=False)
        expected_packed, expected_norms = reference.encode(x, check_finite=False)
        # All NaNs are one: the format leaves their bits open.
        assert_bits_equal(_one_nan(norms), _one_nan(expected_norms))
        assert_bits_equal(packed, expected_packed)
        dtype = data.draw(st.sampled_from(list(self.dtypes)))
        assert_bits_equal(
            _one_nan(mine.decode(packed, norms, dtype=dtype)),
            _one_nan(reference.decode(expected_packed, expected_norms, dtype=dtype)),
        )

    def test_long_vectors_give_the_reference_bits(self) -> None:
        for config in (
            TurboQuantConfig(head_dim=576, bits=5, scale="mse"),
            TurboQuantConfig(head_dim=1536, bits=4, scale="unbiased"),
            TurboQuantConfig(head_dim=4096, bits=2),
        ):
            with _naming(config):
                mine, reference = self._pair(config)
                x = varied_vectors(config.head_dim, rows=13, seed=8)
                packed, norms = mine.encode(self.to_device(x))
                expected_packed, expected_norms = reference.encode(x)
                assert_bits_equal(norms, expected_norms)
                assert_bits_equal(packed, expected_packed)
                assert_bits_equal(
                    mine.decode(packed, norms, dtype="float32"),
                    reference.decode(expected_packed, expected_norms, dtype="float32"),
                )

    def test_a_vector_does_not_depend_on_its_batch(self) -> None:
        for config in (
            TurboQuantConfig(head_dim=128, bits=4, scale="unbiased"),
            TurboQuantConfig(head_dim=96, bits=3, scale="mse"),
            TurboQuantConfig(head_dim=128, bits=2, rotation="haar"),
        ):
            with _naming(config):
                mine, _ = self._pair(config)
                x = varied_vectors(config.head_dim, rows=10_001, seed=4)
                packed, norms = mine.encode(self.to_device(x))
                decoded = mine.decode(packed, norms, dtype="float32")
                for row in (0, 1, 4095, 4096, 10_000):
                    one_packed, one_norm = mine.encode(self.to_device(x[row]))
                    assert one_norm.shape == ()
                    assert_bits_equal(one_packed, packed[row])
                    assert_bits_equal(one_norm, norms[row])
                    one = mine.decode(one_packed, one_norm, dtype="float32")
                    assert_bits_equal(one, decoded[row])

    # -- shapes and special values -----------------------------------------------------------------

    def test_empty_batches(self) -> None:
        mine, _ = self._pair(TurboQuantConfig(head_dim=96, bits=3))
        for batch in [(0,), (3, 0), (0, 2)]:
            x = self.to_device(np.zeros((*batch, 96), np.float32))
            packed, norms = mine.encode(x)
            assert packed.shape == (*batch, 36)
            assert norms.shape == batch
            assert mine.decode(packed, norms).shape == (*batch, 96)
            assert mine.inner_products(self.to_device(np.ones(96)), packed, norms).shape == batch

    def test_outputs_given_are_filled(self) -> None:
        mine, _ = self._pair(TurboQuantConfig(head_dim=100, bits=5))
        x = self.to_device(varied_vectors(100, rows=30, seed=5).reshape(5, 6, 100))
        expected = mine.encode(x)
        packed = self.to_device(np.full((5, 6, 63), 255, np.uint8))
        norms = self.to_device(np.full((5, 6), np.nan, np.float32))
        returned = mine.encode(x, out=(packed, norms))
        assert returned[0] is packed
        assert returned[1] is norms
        assert_bits_equal(packed, expected[0])
        assert_bits_equal(norms, expected[1])
        for dtype in self.dtypes:
            decoded = self.to_device(np.full((5, 6, 100), np.nan).astype(float_dtype(dtype)))
            assert mine.decode(packed, norms, out=decoded) is decoded
            assert_bits_equal(decoded, mine.decode(packed, norms, dtype=dtype))

    def test_the_first_non_finite_vector_is_named(self) -> None:
        mine, _ = self._pair(TurboQuantConfig(head_dim=64, bits=4))
        for bad in (np.nan, np.inf, -np.inf):
            x = np.ones((3, 5000, 64), np.float32)
            x[1, 4321, 17] = bad
            x[2, 0, 0] = np.nan
            packed, norms = mine.encode(self.to_device(x), check_finite=False)
            assert load(self.backend).first_non_finite(norms) == 9321
            assert np.isnan(_on_host(norms[1, 4321]))
            assert not _on_host(packed[1, 4321]).any()
            message = ""
            try:
                mine.encode(self.to_device(x))
            except ValueError as error:
                message = str(error)
            assert message.startswith(f"x[1, 4321, 17] is {bad}")

    # -- inner products ----------------------------------------------------------------------------

    def test_inner_products_agree_with_decoded_vectors(self) -> None:
        for config in self._settings()[:: 1 if self.every_combination else 3]:
            with _naming(config):
                mine, reference = self._pair(config)
                d = config.head_dim
                rng = np.random.Generator(np.random.PCG64([6, d]))
                magnitudes = np.array([1e-30, 1, 1e35])[:, None]
                query = (rng.standard_normal((2, 3, d)) * magnitudes).astype(np.float32)
                x = rng.standard_normal((17, d)).astype(np.float32)
                packed, norms = reference.encode(x)
                scores = mine.inner_products(*map(self.to_device, (query, packed, norms)))
                assert scores.shape == (2, 3, 17)
                assert scores.dtype == np.float32
                decoded = reference.decode(packed, norms, dtype="float64")
                exact = np.inner(query.astype(np.float64), decoded)
                lengths = np.linalg.norm(query.astype(np.float64), axis=-1)
                size = lengths[..., None] * np.linalg.norm(decoded, axis=-1)
                assert (np.abs(_on_host(scores) - exact) <= 2e-6 * size).all()

    def test_inner_products_of_one_query_with_one_vector(self) -> None:
        mine, reference = self._pair(TurboQuantConfig(head_dim=64, bits=4))
        x = varied_vectors(64, rows=1, seed=7)[0]
        packed, norm = mine.encode(self.to_device(x))
        score = mine.inner_products(self.to_device(x.astype(np.float16)), packed, norm)
        assert score.shape == ()
        exact = float(
            x.astype(np.float16) @ reference.decode(*reference.encode(x), dtype="float64")
        )
        assert abs(float(score) - exact) <= 2e-6 * float(x @ x)


@contextmanager
def _naming(*what: Any) -> Iterator[None]:
    """Add to whatever goes wrong what it went wrong for."""
    try:
        yield
    except Exception as error:
        error.add_note(f"with {', '.join(map(str, what))}")
        raise


def _on_host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else array


def _one_nan(array: Any) -> Any:
    host = _on_host(array).copy()
    host[np.isnan(host)] = np.nan
    return host
