"""Who owns what, in which order it is worked on and read, and what a resumed run leaves out."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_jax.pipeline import schedule
from qmoe_jax.pipeline.schedule import BatchKey, Finished, kernel_reads, make_schedule
from qmoe_jax.quantization.settings import CompressionSettings

LAYERS = (("encoder", 1), ("encoder", 3), ("decoder", 1))
SETTINGS = CompressionSettings()


def planned(*finished, settings=SETTINGS, num_experts=8, batch_size=3):
    return make_schedule(
        LAYERS, settings, num_experts=num_experts, batch_size=batch_size, finished=finished
    )


@given(st.integers(0, 300), st.integers(1, 9))
def test_shares_are_contiguous_even_and_cover_all(total, count):
    shares = [schedule.share(total, index, count) for index in range(count)]
    assert [i for own in shares for i in own] == list(range(total))
    sizes = [len(own) for own in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 5))
def test_rounds_hold_every_expert_once_and_no_large_batch(num_experts, size, count):
    for index, own in enumerate(zip(*schedule.rounds(num_experts, size, count), strict=True)):
        experts = [expert for batch in own for expert in batch]
        assert experts == list(schedule.share(num_experts, index, count))
        assert max(len(batch) for batch in own) <= size
        lengths = [len(batch) for batch in own]
        assert lengths == sorted(lengths, reverse=True)  # empty ones last


def test_a_first_run_reads_everything_in_the_order_of_the_data_flow():
    layers = planned(Finished())
    assert [layer.action for layer in layers] == ["compress"] * 3
    assert list(kernel_reads(layers, 0)) == [
        BatchKey(stack, layer, start, min(start + 3, 8))
        for stack, layer in LAYERS
        for start in (0, 3, 6)
    ]


def test_a_resumed_run_reads_what_is_missing():
    finished = Finished(frozenset({"encoder_layer_1"}), frozenset({"encoder_layer_3_experts_0_3"}))
    layers = planned(finished)
    assert [layer.action for layer in layers] == ["replay", "compress", "compress"]
    assert [step.found for step in layers[1].rounds] == [(True,), (False,), (False,)]
    assert layers[1].rounds[0].missing == (range(0),)
    assert layers[1].rounds[1].missing == (range(3, 6),)
    reads = list(kernel_reads(layers, 0))
    assert reads[0] == BatchKey("encoder", 3, 3, 6)
    assert len(reads) == 5


def test_a_layer_that_one_process_has_not_recorded_is_compressed_by_all():
    """The others kept their batches, since they wait for its record before they forget them."""
    batches = frozenset({"encoder_layer_1_experts_0_3", "encoder_layer_1_experts_3_4"})
    ahead = Finished(frozenset({"encoder_layer_1"}), batches)
    behind = Finished(frozenset(), frozenset({"encoder_layer_1_experts_4_7"}))
    layer = planned(ahead, behind)[0]
    assert layer.action == "compress"
    assert [step.experts for step in layer.rounds] == [
        (range(0, 3), range(4, 7)),
        (range(3, 4), range(7, 8)),
    ]
    assert [step.found for step in layer.rounds] == [(True, True), (True, False)]
    assert layer.rounds[1].missing == (range(0), range(7, 8))
    assert [key for key in kernel_reads([layer], 0)] == []
    assert [key for key in kernel_reads([layer], 1)] == [BatchKey("encoder", 1, 7, 8)]


def test_a_process_without_experts_takes_part_and_reads_nothing():
    layers = planned(*[Finished()] * 3, num_experts=2, batch_size=2)
    idle = next(i for i in range(3) if not schedule.share(2, i, 3))
    assert all(step.found[idle] and not step.experts[idle] for step in layers[0].rounds)
    assert list(kernel_reads(layers, idle)) == []


def test_kept_layers_are_read_also_when_resumed():
    settings = CompressionSettings(skip="encoder")
    layers = planned(Finished(frozenset({"decoder_layer_1"})), settings=settings)
    assert [layer.action for layer in layers] == ["keep", "keep", "replay"]
    assert {(key.stack, key.layer) for key in kernel_reads(layers, 0)} == set(LAYERS[:2])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_together_the_processes_read_every_expert_once(count):
    layers = planned(*[Finished()] * count)
    reads = itertools.chain(*(kernel_reads(layers, index) for index in range(count)))
    seen = sorted((k.stack, k.layer, e) for k in reads for e in range(k.start, k.stop))
    assert seen == sorted((stack, layer, e) for stack, layer in LAYERS for e in range(8))


def test_what_is_finished_travels_as_json():
    finished = Finished(frozenset({"a", "b"}), frozenset({"c"}))
    assert Finished.from_json(finished.to_json()) == finished
