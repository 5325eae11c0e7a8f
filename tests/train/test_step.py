"""One step: what it computes again, and what it leaves behind."""

import pytest
import torch

from vitreous.train.engine.prepare import prepare
from vitreous.train.engine.step import Step

WITH_BATCH_NORM = {
    "levit_128s": "img_size=64 embed_dim=(16,32,48) num_heads=(2,2,2) key_dim=8 depth=(1,1,1)",
    "maxvit_rmlp_pico_rw_256": "img_size=64 embed_dim=(32,32,32,32) depths=(1,1,1,1) stem_width=8",
}


@pytest.mark.parametrize("network", WITH_BATCH_NORM)
def test_checkpointing_moves_running_statistics_once(settings, network):
    def after_a_step(accumulate, **changes):
        of = dict(model=network, model_kwargs=tuple(WITH_BATCH_NORM[network].split()), data="cutouts:train=8,test=4,size=64")
        session = prepare(settings(**of, batch_size=8, epochs=1, accumulate=accumulate, **changes))
        session.model.train()
        Step(session, *next(iter(session.train))).gradients()
        values = dict(session.model.named_buffers()), {name: p.grad for name, p in session.learning.items()}
        assert {int(n) for name, n in values[0].items() if name.endswith("num_batches_tracked")} == {accumulate}
        return values

    for accumulate in (1, 2):
        for plain, again in zip(after_a_step(accumulate), after_a_step(accumulate, checkpointing=True), strict=True):
            assert plain.keys() == again.keys()
            assert [name for name, value in plain.items() if value is not None and not torch.equal(value, again[name])] == []
