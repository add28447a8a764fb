"""`python tests/faults/driver.py WORDS`: train.py with faults that no file can cause, as JSON in
the variable FAULTS.

{"sleep": 0.02,            seconds added to every step, so that a trial can hit one
 "nan_loss": [7, 8],       steps whose token weights are NaN: loss and gradients are
 "nan_gradient": [9],      steps whose loss is finite and whose gradients are NaN
 "blind": true}            a full disk shows inside a save only, as a quota does
"""

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = 255  # a byte that the corpus does not hold

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    import jax
    import jax.numpy as jnp
    import numpy as np

    import train
    from ttt_jax.data import Loader
    from ttt_jax.process.signals import StopSignal, end_process
    from ttt_jax.training import step as training
    from ttt_jax.training.saver import Saver

    faults = json.loads(os.environ["FAULTS"])
    cross_entropy, read = training.cross_entropy, Loader.__next__

    def slow_read(self):
        time.sleep(faults.get("sleep", 0))
        batch = read(self)
        if self.batches_done in faults.get("nan_loss", ()):
            batch["weights"] = batch["weights"] * np.float32("nan")
        if self.batches_done in faults.get("nan_gradient", ()):
            # they count nothing
            batch["targets"] = np.where(batch["weights"] == 0, np.int32(MARK), batch["targets"])
        return batch

    @jax.custom_vjp
    def poison(h_BTD, bad):
        return h_BTD

    poison.defvjp(
        lambda h_BTD, bad: (h_BTD, bad),
        lambda bad, g_BTD: (
            jnp.where(jnp.broadcast_to(bad, g_BTD.shape), jnp.float32(jnp.nan), g_BTD),
            None,
        ),
    )

    def poisoned_cross_entropy(h_BTD, weight, targets_BT, weights_BT):
        return cross_entropy(
            poison(h_BTD, (targets_BT == MARK).any()), weight, targets_BT, weights_BT
        )

    if faults.get("blind"):
        Saver._has_space = lambda self: True
    Loader.__next__ = slow_read
    training.cross_entropy = poisoned_cross_entropy
    end_process(train.main(sys.argv[1:], StopSignal(last=True)))
