"""SmolLM2-135M-Instruct in NumPy or CuPy, with its KV cache in float or in TurboQuant pages.

Made to be read and taken apart: `loader` reads the weights, `tokenizer` the vocabulary, `model` is
the forward pass, `caches` an ordinary KV cache beside `turboquant_np.PagedKVCache`, `generate`
the loop, `sampling` the choice of tokens, `layer_bits` the choice of bits, `command` the command
line and `benchmark` its timing.

    python docs/examples/smollm2 --prompt "What is the capital of France?"
"""
