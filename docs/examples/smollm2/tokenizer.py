"""SmolLM2's tokenizer, from the tokens and merges in the GGUF file."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .loader import find_weights

__all__ = ["ChatTokenizer", "TextStream"]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class ChatTokenizer:
    """Text to token ids and back, by byte-level BPE.

    A text comes back as it was, but for bytes that the vocabulary lacks: some control characters,
    and characters beyond U+3FFFF.

    Parameters
    ----------
    path : path-like, optional
        As for `find_weights`.

    Attributes
    ----------
    end : int
        Id of the token that ends a turn of a chat.

    Examples
    --------
    >>> tokenizer = ChatTokenizer()  # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("héllo 123"))  # doctest: +SKIP
    'héllo 123'
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        from gguf import GGUFReader
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        reader = GGUFReader(find_weights(path))
        tokens, merges, kinds = (
            reader.get_field(f"tokenizer.ggml.{name}").contents()
            for name in ("tokens", "merges", "token_type")
        )
        vocabulary = {token: index for index, token in enumerate(tokens)}
        pairs = [tuple(merge.split(" ")) for merge in merges]
        self._bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._bpe.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        self._bpe.add_special_tokens([AddedToken(token, normalized=False) for token in control])
        self._plain = Tokenizer.from_str(self._bpe.to_str())
        self._plain.encode_special_tokens = True  # "<|im_end|>" in a text is only text
        self.end = vocabulary["<|im_end|>"]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; the names of control tokens have no special meaning in it."""
        ids: list[int] = self._plain.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without control tokens; incomplete characters become U+FFFD."""
        text: str = self._bpe.decode(list(ids))
        return text

    def chat(self, prompt: str, system: str = SYSTEM) -> list[int]:
        """Ids of a chat with one question, up to where the answer begins."""
        ids = []
        for role, content in (("system", system), ("user", prompt)):
            ids += self._control(f"<|im_start|>{role}\n")
            ids += self.encode(content)
            ids += self._control("<|im_end|>\n")
        return ids + self._control("<|im_start|>assistant\n")

    def _control(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text).ids
        return ids


class TextStream:
    """Text of ids that come one by one, in pieces that end with a whole character."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """What can be shown now that this token is known, perhaps nothing."""
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < 8:
            return ""
        self._held.clear()
        return text
