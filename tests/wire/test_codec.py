"""Messages survive the wire, and nothing that comes over it does harm."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.wire.codec import (
    ids_in,
    pack,
    pack_failure,
    pack_layout,
    pack_outcome,
    ranges,
    unpack,
    unpack_failure,
    unpack_layout,
    unpack_outcome,
)
from penstock.wire.errors import BadMessage
from penstock.wire.fields import U64_MAX
from penstock.wire.messages import (
    FROM_CALLER,
    FROM_WORKER,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    TO_CALLER,
    TO_WORKER,
    VERSION,
    Assign,
    Bye,
    Carrier,
    Done,
    Form,
    Message,
    Requests,
    Submit,
    Tasks,
    Welcome,
)
from tests.wire.strategies import KINDS, MESSAGES, failures, layouts, messages, outcomes

LIGHT = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
THOROUGH = settings(LIGHT, max_examples=300)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), U64_MAX)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5))
    | st.just(msgpack.Timestamp(1, 2))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
some_frames = st.lists(st.sampled_from([0, 1, INLINE_MAX_BYTES, INLINE_MAX_BYTES + 1]).map(bytes), max_size=3)


def frames_of(message: Message) -> Sequence[bytes]:
    return message.frames if isinstance(message, Carrier) else []


def read(head: bytes, frames: Sequence[bytes] = ()) -> Message | None:
    """The message, or None for what is none; what unpacking lets through must itself survive the wire."""
    try:
        message = unpack(head, frames, KINDS)
    except BadMessage:
        return None
    assert unpack(pack(message), frames, KINDS) == message
    return message


def put(value: Any, path: Sequence[int], new: Any) -> Any:
    """``value`` with something else in one place. ``path``: at which child to turn, level by level."""
    if not path or not isinstance(value, (list, tuple)) or not value:
        return new
    at = path[0] % len(value)
    return [*value[:at], put(value[at], path[1:], new), *value[at + 1 :]]


def submit(
    ids: Any = (1,),
    timeouts_us: Any = (1000,),
    form: Any = None,
    acks: Any = (),
    blob: bytes = b"",
    places: Any = (),
) -> bytes:
    """A Submit with one group, as it travels; anything may stand in its places."""
    form = form or ("m", "1", 0, "", 1, 0, b"", b"", "", 0)
    packed: bytes = msgpack.packb((VERSION, Submit.TAG, 5, [(form, ids, timeouts_us, places)], acks, (), blob))
    return packed


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_kind_of_message_survives_the_wire(kind: type[Message]) -> None:
    @LIGHT
    @given(MESSAGES[kind])
    def survives(message: Message) -> None:
        assert unpack(pack(message), frames_of(message), KINDS) == message

    survives()


def test_what_cannot_be_packed_leaves_nothing_to_the_next() -> None:
    whole = pack(Welcome(5, "caller"))
    for unfit in (object(), 1 << 70):
        with pytest.raises((TypeError, OverflowError)):
            pack(Welcome(unfit, "caller"))  # type: ignore[arg-type]
        assert pack(Welcome(5, "caller")) == whole


def test_the_memory_of_a_large_message_is_given_back() -> None:
    large = Submit(5, [], (), (), blob=bytes(20 << 20))
    tracemalloc.start()
    try:
        assert len(pack(large)) > 20 << 20
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_threads_pack_at_the_same_time() -> None:
    messages = [Welcome(number, "x" * number) for number in range(200)]
    expected = [pack(message) for message in messages]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(pack, messages * 20)) == expected * 20


def test_strategies_leave_out_no_kind_of_message() -> None:
    assert set(MESSAGES) == set(KINDS.values())


@THOROUGH
@given(st.binary(max_size=60), some_frames)
def test_any_bytes_are_a_message_or_refused(head: bytes, frames: list[bytes]) -> None:
    read(head, frames)


@THOROUGH
@given(values)
def test_any_value_is_a_message_or_refused(value: Any) -> None:
    read(msgpack.packb(value))


@THOROUGH
@given(st.sampled_from(sorted(KINDS)), st.lists(values, max_size=9), some_frames)
def test_any_fields_behind_a_tag_are_a_message_or_refused(tag: int, fields: list[Any], frames: list[bytes]) -> None:
    for count in {len(fields), len(KINDS[tag].CHECKS)}:
        read(msgpack.packb([VERSION, tag, 1, *fields[:count]]), frames)


@THOROUGH
@given(messages, st.lists(st.integers(0, 7), min_size=1, max_size=5), values)
def test_a_message_with_one_wrong_value_is_a_message_or_refused(message: Message, path: list[int], value: Any) -> None:
    whole = msgpack.unpackb(pack(message))
    read(msgpack.packb(put(whole, path, value)), frames_of(message))


@THOROUGH
@given(messages, st.data())
def test_a_message_with_one_wrong_byte_is_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    head = bytearray(pack(message))
    head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    read(bytes(head), frames_of(message))


@THOROUGH
@given(messages, some_frames)
def test_frames_are_what_the_groups_say_or_refused(message: Message, frames: list[bytes]) -> None:
    groups = [group for group in getattr(message, "groups", ()) if not getattr(group, "places", ())]
    expected = [group.nbytes for group in groups for _ in group.ids]
    expected = [size for size in expected if size > INLINE_MAX_BYTES]
    assert (read(pack(message), frames) is not None) == (list(map(len, frames)) == expected)


@LIGHT
@given(messages, st.integers(1, 20))
def test_a_message_that_ends_too_early_is_refused(message: Message, missing: int) -> None:
    head = pack(message)
    with pytest.raises(BadMessage, match="not msgpack"):
        unpack(head[:-missing], frames_of(message), KINDS)


def test_each_direction_has_its_own_messages() -> None:
    directions: list[Mapping[int, type[Message]]] = [FROM_CALLER, FROM_WORKER, TO_CALLER, TO_WORKER, ON_PUBLICATION]
    for kinds in directions:
        for tag in set(KINDS) - set(kinds):
            with pytest.raises(BadMessage, match=f"does not send messages with the tag {tag}"):
                unpack(msgpack.packb((VERSION, tag, 0)), (), kinds)


@pytest.mark.parametrize("version", [0, 2, "1", None, (1,), -1])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(BadMessage, match=r"version .* of the protocol, and this process version 1"):
        unpack(msgpack.packb((version, Bye.TAG, 1)), (), KINDS)


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "1", None])
def test_an_epoch_is_a_whole_number(epoch: object) -> None:
    with pytest.raises(BadMessage, match="an epoch is a whole number"):
        unpack(msgpack.packb((VERSION, Bye.TAG, epoch)), (), KINDS)


@pytest.mark.parametrize("tag", [True, 5.0, "5", None, 99, [5]])
def test_a_tag_is_one_of_the_known_whole_numbers(tag: object) -> None:
    with pytest.raises(BadMessage, match="with the tag"):
        unpack(msgpack.packb((VERSION, tag, 1)), (), KINDS)


@pytest.mark.parametrize("depth", [10, 500, 1000, 1020, 1024, 100_000])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_values_nested_deeply_are_refused(place: int, depth: int) -> None:
    # A repr in the error would recurse as deep as the sender likes.
    parts = [b"\x01", bytes([Submit.TAG]), b"\x05", b"\x90", b"\x90", b"\x90", b"\xc4\x00"]
    parts[place] = b"\x91" * depth + b"\x01"
    with pytest.raises(BadMessage):
        unpack(b"\x97" + b"".join(parts), (), KINDS)


def test_a_message_has_the_fields_of_its_kind_and_no_more() -> None:
    for fields in ((), (b"12345678",), (b"12345678", 1, True, 0)):
        with pytest.raises(BadMessage, match=f"Attached has 6 fields, and {3 + len(fields)} came"):
            unpack(msgpack.packb((VERSION, 9, 1, *fields)), (), KINDS)


def test_a_message_without_payloads_has_one_frame() -> None:
    with pytest.raises(BadMessage, match="Bye has one frame, and 3 came"):
        unpack(pack(Bye(1)), [b"", b""], KINDS)


@pytest.mark.parametrize("place", [2, 4, 5, 9])
@pytest.mark.parametrize("change", [float, bool])
def test_a_form_whose_numbers_are_not_int_does_not_pass_for_a_known_one(
    place: int, change: Callable[[int], object]
) -> None:
    form = ["m", "1", 1, "", 1, 1, b"", b"", "", 1]
    known = unpack(submit(form=form, blob=b"x"), (), KINDS)
    assert isinstance(known, Submit)
    form[place] = change(1)
    with pytest.raises(BadMessage, match="is not a whole number"):
        unpack(submit(form=form, blob=b"x"), (), KINDS)


def test_equal_forms_become_one_object() -> None:
    first, again = unpack(submit(), (), KINDS), unpack(submit(), (), KINDS)
    assert isinstance(first, Submit)
    assert isinstance(again, Submit)
    assert first.groups[0].form is again.groups[0].form


@pytest.mark.parametrize("bad", [[1.0], [-1], ["1"], [None], [True], [b"1"], [[1]], 1, None, {}, b"1"])
@pytest.mark.parametrize("column", ["ids", "timeouts_us"])
def test_a_column_is_whole_numbers_of_64_bits(column: str, bad: Any) -> None:
    with pytest.raises(BadMessage):
        unpack(submit(**{column: bad}), (), KINDS)


def test_columns_hold_the_largest_numbers() -> None:
    message = unpack(submit((U64_MAX, 0), (0, U64_MAX)), (), KINDS)
    assert isinstance(message, Submit)
    assert message.groups[0].ids == (U64_MAX, 0)
    assert message.groups[0].timeouts_us == (0, U64_MAX)


def test_columns_are_equally_long() -> None:
    with pytest.raises(BadMessage, match="a column is 2 whole numbers"):
        unpack(submit((1, 2), (1000,)), (), KINDS)


def test_a_group_is_neither_empty_nor_larger_than_a_message() -> None:
    for count in (0, 4097):
        with pytest.raises(BadMessage, match="a group has from 1 to 4096 ids"):
            unpack(submit(tuple(range(count)), (1000,) * count), (), KINDS)


@pytest.mark.parametrize("acks", [(1,), (5, 3), (1, 3, 3, 4), (1, 3, 2, 4), (4, 5, 1, 2), (1, 1.0), (-1, 1)])
def test_ranges_are_pairs_that_ascend_and_do_not_meet(acks: Sequence[object]) -> None:
    with pytest.raises(BadMessage):
        unpack(submit(acks=acks), (), KINDS)


def test_ranges_may_touch_and_reach_to_the_largest_id() -> None:
    message = unpack(submit(acks=(0, 0, 1, 5, 6, U64_MAX)), (), KINDS)
    assert isinstance(message, Submit)
    assert message.acks == (0, 0, 1, 5, 6, U64_MAX)


LARGE = INLINE_MAX_BYTES + 1


def carried(*sizes: int) -> list[Requests]:
    """Groups of two requests each, with payloads of these sizes."""
    forms = [Form("m", "1", 0, "", 1, size, b"", b"") for size in sizes]
    return [Requests(form, (2 * at + 1, 2 * at + 2), (1000, 1000)) for at, form in enumerate(forms)]


def test_payloads_are_found_where_they_start() -> None:
    groups = carried(3, LARGE, 0, 5, LARGE + 1)
    frames = [bytes(LARGE)] * 2 + [bytes(LARGE + 1)] * 2
    message = unpack(pack(Submit(1, groups, blob=bytes(16), frames=frames)), frames, FROM_CALLER)
    assert isinstance(message, Submit)
    assert message.starts == [0, 0, 6, 6, 2]


@pytest.mark.parametrize("blob", [0, 5, 7, 12])
def test_a_blob_has_the_size_that_its_groups_say(blob: int) -> None:
    with pytest.raises(BadMessage, match=f"payloads of 6 bytes and 0 frames came as {blob} bytes and 0 frames"):
        unpack(pack(Submit(1, carried(3), blob=bytes(blob))), (), FROM_CALLER)


@pytest.mark.parametrize("sizes", [(), (LARGE,), (LARGE, LARGE - 1), (LARGE, LARGE, LARGE), (LARGE, 0)])
def test_frames_have_the_number_and_sizes_that_their_groups_say(sizes: tuple[int, ...]) -> None:
    frames = list(map(bytes, sizes))
    with pytest.raises(BadMessage, match="payload"):
        unpack(pack(Submit(1, carried(LARGE))), frames, FROM_CALLER)


def test_a_size_nobody_could_send_is_refused() -> None:
    for size in (U64_MAX, 1 << 40):
        with pytest.raises(BadMessage, match="payloads of 0 bytes and 2 frames came as 0 bytes and 0 frames"):
            unpack(pack(Submit(1, carried(size))), (), FROM_CALLER)


@LIGHT
@given(layouts, outcomes, failures)
def test_bodies_survive_the_wire(layout: Any, outcome: Any, failure: Any) -> None:
    assert unpack_layout(pack_layout(layout)) == layout
    assert unpack_outcome(pack_outcome(outcome)) == outcome
    assert unpack_failure(pack_failure(failure)) == failure


@THOROUGH
@given(st.binary(max_size=40) | values.map(msgpack.packb), st.sampled_from([unpack_layout, unpack_outcome]))
def test_any_body_is_valid_or_refused(body: bytes, read_body: Callable[[bytes], object]) -> None:
    try:
        read_body(body)
        unpack_failure(body)
    except BadMessage:
        pass


@THOROUGH
@given(st.sets(st.integers(0, 40) | st.integers(U64_MAX - 3, U64_MAX)))
def test_ranges_hold_the_ids_that_they_were_made_of(ids: set[int]) -> None:
    made = ranges(sorted(ids))
    assert {number for at in range(0, len(made), 2) for number in range(made[at], made[at + 1] + 1)} == ids
    done = Submit(1, (), made)
    assert unpack(pack(done), (), FROM_CALLER) == Submit(1, (), made, starts=[])


@THOROUGH
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.booleans())
def test_ids_in_ranges_are_those_that_are_known_each_once(known: set[int], said: set[int], to_the_end: bool) -> None:
    made = ranges(sorted(said))
    if to_the_end:
        made += (100, U64_MAX)
    found = ids_in(made, dict.fromkeys(known))
    assert sorted(found) == sorted(known & said)


def test_huge_ranges_cost_no_more_than_what_is_known() -> None:
    known = dict.fromkeys(range(0, 100_000, 7))
    every_other = tuple(number for at in range(4096) for number in (at * 2**50, at * 2**50 + 2**49))
    before = time.process_time()
    assert len(ids_in((0, U64_MAX), known)) == len(known)
    assert len(ids_in(every_other, known)) == len(known)
    assert ids_in((200_000, U64_MAX), known) == []
    assert time.process_time() - before < 2.0  # 4096 looks at each of them would take far longer


def test_who_has_waited_so_long_that_no_answer_could_say_it_is_refused() -> None:
    tasks = Tasks(Form("m", "1", 0, "", 1, 0, b"", b""), b"a caller", 1, 1 << 62, (1,), (0,))
    assert isinstance(unpack(pack(Assign(1, [tasks])), (), TO_WORKER), Assign)
    with pytest.raises(BadMessage, match="is not a whole number from 0 to"):
        unpack(pack(Assign(1, [tasks._replace(waited_us=(1 << 62) + 1)])), (), TO_WORKER)


def test_done_for_nobody_is_a_message() -> None:
    assert unpack(pack(Done(3, ())), (), FROM_WORKER) == Done(3, ())


LARGE_FORM = ("m", "1", 0, "", 1, INLINE_MAX_BYTES + 1, b"", b"", "", 0)


def test_what_lies_in_an_arena_comes_without_frames() -> None:
    message = unpack(submit((7, 8), (1, 2), LARGE_FORM, places=(64, 2**64 - 1)), [], FROM_CALLER)
    assert isinstance(message, Submit)
    assert message.groups[0].places == (64, 2**64 - 1)
    with pytest.raises(BadMessage, match="payloads of 0 bytes and 0 frames came as 0 bytes and 1 frames"):
        unpack(submit((7,), (1,), LARGE_FORM, places=(64,)), [bytes(INLINE_MAX_BYTES + 1)], FROM_CALLER)


@pytest.mark.parametrize("places", [(1,), (1, 2, 3), (1, -1), (1, 1.5), (1, True, 3), 5, None, "ab", {}])
def test_places_are_one_whole_number_for_each_request(places: Any) -> None:
    with pytest.raises(BadMessage, match="a column is 2 whole numbers"):
        unpack(submit((7, 8), (1, 2), LARGE_FORM, places=places), [], FROM_CALLER)


def test_what_could_ride_in_the_message_may_lie_in_an_arena() -> None:
    form = ("m", "1", 0, "", 1, 3, b"", b"", "", 0)
    message = unpack(submit((7,), (1,), form, places=(5,)), [], FROM_CALLER)
    assert isinstance(message, Submit)
    assert (message.groups[0].places, message.blob) == ((5,), b"")
    with pytest.raises(BadMessage, match="payloads of 0 bytes and 0 frames came as 3 bytes and 0 frames"):
        unpack(submit((7,), (1,), form, blob=b"abc", places=(5,)), [], FROM_CALLER)
