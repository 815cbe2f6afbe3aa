"""What a call sends: nothing may be added to it unnoticed."""

import pytest
import sharded
import torch
from inputs import logits, targets
from oracle import Case

pytestmark = pytest.mark.timeout(120, func_only=True)  # not of the processes' start
N, V, WORLD = 24, 50, 2
CHECK = ("allgather_base", 416)  # that all make the same call, on CPU alone
BOUNDS = sharded.even(V, WORLD)


def rows(num_fields: int, num_rows: int = N) -> tuple[str, int]:
    """One exchange: float32 fields and the target of each row, and three numbers of the process."""
    return ("allgather_base", 4 * ((num_fields + 1) * num_rows + 3))


def check(running, case: Case, forward: list, backward: list, whole=()) -> None:
    for found in running.run(WORLD, sharded.count_collectives, case, BOUNDS, whole):
        assert found == (forward, backward)


def head(width: int, grad: bool, num_rows: int = N):
    found = sharded.head((num_rows,), V, width, torch.float32)
    return found if grad else type(found)(found.hidden.detach(), found.weight.detach())


def test_logits_send_three_numbers_and_the_target_of_a_row(running):
    case = Case(logits(N, V), logits(N, V, requires_grad=True), targets(N, vocab_size=V))
    check(running, case, [CHECK, rows(3)], [])  # max, log_denom, nll; backward is of the own columns


def test_label_smoothing_sends_one_more(running):
    case = Case(logits(N, V), logits(N, V, requires_grad=True), targets(N, vocab_size=V), {"label_smoothing": 0.1})
    check(running, case, [CHECK, rows(4)], [])


def test_a_frozen_base_sends_nothing_of_its_own(running):
    y = targets(N, vocab_size=V)
    hidden = ("allreduce", 4 * N * 8)
    check(running, Case(head(16, False), head(8, True), y), [CHECK, rows(3)], [hidden])
    check(running, Case(None or head(8, True), None, y), [CHECK, rows(3)], [hidden])


def test_gradients_of_two_hidden_states_are_added_up_at_once(running):
    case = Case(head(16, True), head(8, True), targets(N, vocab_size=V))
    check(running, case, [CHECK, rows(3)], [("allreduce", 4 * N * (16 + 8))])


def test_a_weight_that_all_hold_sends_its_gradient(running):
    case = Case(head(16, False), head(8, True), targets(N, vocab_size=V))
    check(running, case, [CHECK, rows(3)], [("allreduce", 4 * (N + V) * 8)], ("aux[0]",))


def test_heads_exchange_the_rows_of_each_chunk(running):
    N = 2048
    case = Case(head(16, False, N), head(8, True, N), targets(N, vocab_size=V))
    found = running.run(WORLD, sharded.count_in_chunks, case, BOUNDS)
    for forward, backward in found:
        assert forward == [CHECK, *[rows(3, 256)] * (N // 256)]  # no chunk has fewer rows
        assert backward == [("allreduce", 4 * N * 8)]


def test_statistics_send_their_parts_and_first_the_targets_sums(running):
    case = Case(logits(N, V), logits(N, V, requires_grad=True), targets(N, vocab_size=V), {"return_stats": True})
    sums = ("allgather_base", 4 * 2 * N)
    check(running, case, [CHECK, sums, rows(11)], [])
