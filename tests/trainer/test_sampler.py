"""Which samples come together: nothing lost or repeated, the same steps however they are cut."""

from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadSampleError
from model.LMConfig import VLMConfig
from trainer.collate import TrainSamples, make_loader
from trainer.config import TrainConfig
from trainer.sampler import StepSampler
from trainer.schedule import Schedule

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=300).map(
    lambda values: np.array(values, dtype=np.int32)
)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_every_sample_once_in_an_epoch_over_all_ranks(
    lengths, batch_size, accumulation_steps, world_size, epoch
):
    seen = []
    for rank in range(world_size):
        batches = StepSampler(lengths, batch_size, accumulation_steps, rank, world_size, seed=3)
        batches.epoch = epoch
        mine = list(batches)
        assert len(mine) == len(batches) == batches.steps_left * accumulation_steps
        assert all(len(batch) <= batch_size for batch in mine)
        seen += [index for batch in mine for index in batch]
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_a_step_has_the_same_samples_however_it_is_cut_up(lengths):
    def steps(batch_size, accumulation_steps, world_size):
        ranks = [
            list(StepSampler(lengths, batch_size, accumulation_steps, rank, world_size, seed=1))
            for rank in range(world_size)
        ]
        n = len(ranks[0]) // accumulation_steps
        parts = [
            [
                batch
                for rank in ranks
                for batch in rank[i * accumulation_steps : (i + 1) * accumulation_steps]
            ]
            for i in range(n)
        ]
        return [sorted(index for batch in step for index in batch) for step in parts]

    assert steps(16, 1, 1) == steps(8, 1, 2) == steps(8, 2, 1) == steps(4, 2, 2)


def test_steps_are_random_and_their_batches_of_like_length():
    lengths = np.random.default_rng(0).integers(200, 600, 4000)
    batches = StepSampler(lengths, 16, accumulation_steps=4, seed=1)
    first = list(batches)
    assert first == list(batches)
    batches.epoch = 1
    assert first != list(batches)
    steps = np.stack([np.concatenate(first[i : i + 4]) for i in range(0, 248, 4)])
    assert steps.shape == (62, 64) and np.std(lengths[steps].mean(axis=1)) < 20, (
        "steps are samples of the whole set"
    )

    def padding(cut):
        return 1 - sum(lengths[b].sum() for b in cut) / sum(lengths[b].max() * len(b) for b in cut)

    assert padding(first) < 0.12 < 0.25 < padding(list(StepSampler(lengths, 64, seed=1)))
    assert padding(list(StepSampler(lengths, 16, shuffle=False))) < 0.01, (
        "validation may take them in order of length"
    )


class Samples:
    def __len__(self):
        return 5

    def read_text(self, index):
        if index in (1, 4):
            raise BadSampleError("image damaged", "x.jpg")
        ids = torch.arange(3 + index)
        return {"input_ids": ids, "labels": ids}, [BytesIO(b"picture")] * (index % 2)

    processor = SimpleNamespace(
        resize=lambda image: torch.ones(3, 4, 4, dtype=torch.uint8), config=VLMConfig()
    )


def test_bad_samples_are_left_out_and_counted():
    safe = TrainSamples(Samples())
    batch = safe.collate([safe[i] for i in range(4)])
    assert batch.input_ids.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.labels[0].tolist() == [0, 1, 2, -100, -100, -100]
    assert (
        batch.indices == [0, 2, 3]
        and batch.skipped == {"image damaged": 1}
        and len(batch.pixels) == 1
    )
    assert batch.label_indices.tolist() == [1, 2, 7, 8, 9, 10, 13, 14, 15, 16, 17], (
        "nothing comes before the first token of a row"
    )
    assert batch.n_labels == 2 + 4 + 5 and batch.n_padding == 3 + 1
    blank = safe.collate([safe[1], safe[4]])
    assert blank.n_labels == 0 and blank.skipped == {"image damaged": 2} and blank.pixels is None


def test_loader_workers_report_bad_samples():
    loader = make_loader(Samples(), StepSampler(np.arange(5), 2, shuffle=False), num_workers=2)
    batches = list(loader)
    assert sum(len(batch.indices) for batch in batches) == 3
    assert sum(batch.skipped["image damaged"] for batch in batches) == 2


def test_learning_rate_is_the_published_schedule():
    config = TrainConfig(learning_rate=1e-3)
    schedule = Schedule(config, StepSampler(np.ones(100), 1), steps_done=0)
    assert schedule.total_steps == schedule.total_samples == 100
    assert schedule.learning_rate(0, 0) == 1e-4 + 1e-3
    assert abs(schedule.learning_rate(50, 50) - (1e-4 + 0.5e-3)) < 1e-9
    assert abs(schedule.learning_rate(100, 100) - 1e-4) < 1e-9
    warm = Schedule(replace(config, warmup_iters=10), StepSampler(np.ones(100), 1), steps_done=0)
    factors = [warm.learning_rate(0, step) / (1e-4 + 1e-3) for step in (0, 9, 50)]
    assert np.allclose(factors, [0.1, 1, 1])
