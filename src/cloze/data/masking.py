"""Which tokens of a sample are masked, and by what: a pure function of (seed, sample number).

BERT's rule (Devlin et al., 2019, section 3.1) as `transformers.DataCollatorForLanguageModeling` applies it: every
token that is not special is chosen with `mlm_probability`; of the chosen ones `mask_replace_prob` become the mask
token, `random_replace_prob` a random token, the rest stay. The random numbers come from a counter-based generator
keyed by (seed, sample number), so there is no state to save, and the masks do not depend on ranks, batch size or
workers. Every pass over the data draws new masks, since sample numbers go on counting.

    masking = Masking(mask_token_id=4, vocab_size=50265, special_token_ids=(0, 1, 2, 3, 4), seed=42)
    input_ids, labels = masking.apply(blocks, samples)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.data.hashing import draw_at, draws, keys_for, make_key

IGNORE_INDEX = -100  # the label of tokens that are not predicted; torch's cross_entropy ignores it
_PURPOSE_TRAIN, _PURPOSE_EVAL = 0x747261696E, 0x6576616C


@dataclass(frozen=True)
class Masking:
    """The masking rule of a run. `evaluation` draws masks apart from the training ones of the same seed."""

    mask_token_id: int
    vocab_size: int
    special_token_ids: tuple[int, ...]
    seed: int
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    evaluation: bool = False

    @classmethod
    def from_manifest(
        cls,
        manifest: dict[str, Any],
        seed: int,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
    ) -> Masking:
        """The rule for the tokenizer of a prepared folder's manifest."""
        tokenizer = manifest["tokenizer"]
        return cls(
            mask_token_id=tokenizer["mask_token_id"],
            vocab_size=tokenizer["vocab_size"],
            special_token_ids=tuple(tokenizer["special_token_ids"]),
            seed=seed,
            mlm_probability=mlm_probability,
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
        )

    def for_evaluation(self) -> Masking:
        """The same rule with the fixed masks of evaluation, which training never draws."""
        return replace(self, evaluation=True)

    def apply(
        self, blocks: NDArray[np.int32], samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Mask blocks [B, S] that are samples [B] of the run -> (input_ids, labels), both [B, S] int64.

        labels hold the original token where it is to be predicted, IGNORE_INDEX elsewhere.
        """
        size = blocks.shape[1]
        purpose = _PURPOSE_EVAL if self.evaluation else _PURPOSE_TRAIN
        keys = keys_for(make_key(self.seed, purpose), samples)
        chosen = draws(keys, 0, size) < _threshold(self.mlm_probability)
        special = np.zeros(max(self.special_token_ids, default=0) + 2, bool)
        special[list(self.special_token_ids)] = True
        chosen &= ~special[np.minimum(blocks, len(special) - 1)]
        rows, columns = np.nonzero(chosen)  # what becomes of a token is drawn for the chosen ones only
        originals = blocks[rows, columns]
        action = draw_at(keys[rows], size + columns)
        token = ((draw_at(keys[rows], 2 * size + columns) >> np.uint64(32)) * np.uint64(self.vocab_size)) >> np.uint64(
            32
        )
        to_mask = action < _threshold(self.mask_replace_prob)
        to_random = ~to_mask & (action < _threshold(self.mask_replace_prob + self.random_replace_prob))
        shown = np.where(to_mask, self.mask_token_id, np.where(to_random, token.astype(np.int64), originals))
        input_ids = blocks.astype(np.int64)
        input_ids[rows, columns] = shown
        labels = np.full(blocks.shape, IGNORE_INDEX, np.int64)
        labels[rows, columns] = originals
        return input_ids, labels


def _threshold(probability: float) -> np.uint64:
    """`draw < _threshold(p)` happens with probability p."""
    return np.uint64(min(max(0, round(probability * 2.0**64)), 2**64 - 1))
