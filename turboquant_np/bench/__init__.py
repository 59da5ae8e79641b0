"""The benchmark: ``turboquant-np bench``, or ``python -m turboquant_np.bench``.

Every figure comes with a ratio to something measured in the same moments: the memory bandwidth or
the matrix product of the machine, or another library on the same data.
"""
