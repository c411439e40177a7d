"""Run xplique's CRAFT on given activations, codes and a given head; saves what it makes of them.

Usage: python peer_xplique.py GIVEN.npz FOUND.npz   (in an environment of benchmarks/xplique.txt)
"""

import sys
import time

import numpy as np
from xplique.attributions.global_sensitivity_analysis import HaltonSequenceRS, JansenEstimator
from xplique.concepts.craft import BaseCraft


class Given(BaseCraft):
    """CRAFT whose encoder, crops and head are the arrays of the file."""

    def __init__(self, arrays: dict) -> None:
        super().__init__(lambda x: x, lambda a: a, number_of_concepts=int(arrays["k"]))
        self.arrays, self.passes, self.seconds = arrays, 0, 0.0

    def _latent_predict(self, inputs):
        return inputs

    def _logit_predict(self, activations):
        began = time.process_time()
        self.passes += len(activations)
        pooled = activations.mean((1, 2)) if activations.ndim == 4 else activations
        hidden = np.maximum(pooled @ self.arrays["hidden"], 0)
        logits = hidden @ self.arrays["head"]
        self.seconds += time.process_time() - began
        return logits

    def _extract_patches(self, inputs):
        return inputs, self.arrays["crops"]

    def _to_np_array(self, inputs, dtype):
        return np.asarray(inputs, dtype=dtype)


def main(given: str, found: str) -> None:
    """Factorise the crops, encode the maps, weigh the concepts."""
    arrays = dict(np.load(given))
    craft = Given(arrays)
    _, crop_codes, dictionary = craft.fit(arrays["maps"], int(arrays["target"]))
    codes = craft.transform(arrays["maps"])
    importance = craft.estimate_importance(arrays["maps"], nb_design=int(arrays["design"]))
    masks = HaltonSequenceRS()(int(arrays["k"]), nb_design=int(arrays["design"]))
    jansen = JansenEstimator()(masks, arrays["outputs"], int(arrays["design"]))
    np.savez(found, crop_codes=crop_codes, dictionary=dictionary, codes=codes, importance=importance,
             masks=np.asarray(masks), jansen=np.asarray(jansen), passes=craft.passes)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
