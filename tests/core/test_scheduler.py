"""What a step carries: budget, turns, fairness, blocks taken back."""

import pytest
from conversation import GREEDY, sampled, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from shardwright.core.scheduler import BudgetFor, Scheduler, whole_budget
from shardwright.core.sequence import Sequence, SequenceStatus
from shardwright.core.step_budget import LEAST_TOKENS, ContextCost, PromptBudget
from shardwright.types import FinishReason, StepInput, StopConditions


class Driver:
    """A scheduler with its step numbers; answers every step with the token 50."""

    def __init__(self, *, num_blocks: int = 16, num_groups: int = 1, **changes: object) -> None:
        self.scheduler = Scheduler(settings(**changes), max_context=1000)
        self.scheduler.restart(num_blocks)
        self.num_groups = num_groups
        self.last_step = 0
        self.open: dict[int, Sequence] = {}
        self.allowance: BudgetFor = whole_budget

    def add(self, seq_id: int, num_prompt: int, *, new: int = 100, first: int = 0) -> Sequence:
        """A prompt of its own (no shared prefix) unless `first` says otherwise."""
        start = first or 1000 * seq_id
        sequence = Sequence(
            seq_id=seq_id,
            tokens=list(range(start, start + num_prompt)),
            num_prompt_tokens=num_prompt,
            sampling=GREEDY,
            stop=StopConditions(max_new_tokens=new),
        )
        assert self.scheduler.add(sequence) is None
        self.open[seq_id] = sequence
        return sequence

    def step(self) -> StepInput | None:
        step = self.scheduler.schedule(
            epoch=1, step=self.last_step + 1, num_groups=self.num_groups, prompt_budget=self.allowance
        )
        if step is not None:
            self.last_step = step.step
        self.check()
        return step

    def back(self, step: StepInput) -> None:
        answers = sampled(step.step, *((s.seq_id, 50) for s in step.slices if s.sampling is not None)).tokens
        assert self.scheduler.mismatch(step.step, answers) is None
        for advance in self.scheduler.complete(step.step, answers):
            if advance.finish is not None:
                del self.open[advance.sequence.seq_id]
        self.check()

    def end(self, seq_id: int) -> None:
        self.scheduler.end(self.open.pop(seq_id))
        self.check()

    def check(self) -> None:
        self.scheduler.check(self.open.values())

    def shape(self) -> list[tuple[int, int]]:
        """Sequence and number of tokens of each slice of the next step, which is computed at once."""
        step = self.step()
        if step is None:
            return []
        self.back(step)
        return [(s.seq_id, s.num_tokens) for s in step.slices]


def test_a_long_prompts_chunks_take_only_what_the_others_leave():
    """Nobody's next token waits for a prompt: decode goes first, chunks fill the budget up."""
    driver = Driver()
    driver.add(1, 3)
    assert driver.shape() == [(1, 3)]
    driver.add(2, 18)
    assert driver.shape() == [(1, 1), (2, 7)]
    assert driver.shape() == [(1, 1), (2, 7)]
    assert driver.shape() == [(1, 1), (2, 4)]
    assert driver.shape() == [(1, 1), (2, 1)]


def test_an_earlier_long_prompt_does_not_hold_up_a_later_one_that_decodes():
    driver = Driver()
    driver.add(1, 20)
    driver.add(2, 3)
    assert driver.shape() == [(1, 8)]
    assert driver.shape() == [(1, 8)]
    assert driver.shape() == [(1, 4), (2, 3)]
    assert driver.shape() == [(1, 1), (2, 1)]


def test_sequences_take_turns_when_the_budget_is_smaller_than_their_number():
    driver = Driver(token_budget=2)
    for seq_id in (1, 2, 3, 4):
        driver.add(seq_id, 1)
    for step in (driver.step(), driver.step()):
        driver.back(step)
    driver.end(1)
    carried = [seq_id for _ in range(6) for seq_id, _ in driver.shape()]
    assert {seq_id: carried.count(seq_id) for seq_id in (2, 3, 4)} == {2: 4, 3: 4, 4: 4}


def test_admission_is_in_order_of_arrival():
    """A small prompt does not slip past a large one that finds no room."""
    driver = Driver(num_blocks=4, token_budget=64)
    driver.add(1, 8)
    driver.add(2, 9)
    driver.add(3, 1)
    assert driver.shape() == [(1, 8)]
    driver.end(1)
    assert driver.shape() == [(2, 9), (3, 1)]


def test_no_more_than_max_running_hold_blocks():
    driver = Driver(max_running=2)
    for seq_id in (1, 2, 3):
        driver.add(seq_id, 1)
    assert driver.shape() == [(1, 1), (2, 1)]
    driver.end(1)
    assert driver.shape() == [(2, 1), (3, 1)]


def test_the_latest_arrival_gives_its_blocks_up_and_is_computed_again():
    """Sequence 1 needs a third block; 2 came last, waits, and goes on with the same tokens when 1 is over."""
    driver = Driver(num_blocks=4, token_budget=64, prefix_cache=False)
    first = driver.add(1, 7, new=5)
    second = driver.add(2, 7, new=4)
    assert driver.shape() == [(1, 7), (2, 7)]
    assert driver.shape() == [(1, 1), (2, 1)]
    assert driver.shape() == [(1, 1)]
    assert (second.status, second.num_computed_tokens, second.block_table) == (SequenceStatus.WAITING, 0, [])
    assert second.num_output_tokens == 2
    assert [driver.shape() for _ in range(2)] == [[(1, 1)], [(1, 1)]]
    assert first.status is SequenceStatus.FINISHED
    assert driver.shape() == [(2, 9)]
    assert driver.scheduler.total_preemptions == 1


def test_the_latest_arrival_waits_with_its_blocks_rather_than_give_them_up_to_itself():
    driver = Driver(num_blocks=5, token_budget=64)
    driver.add(1, 8, new=2)
    second = driver.add(2, 8, new=4)
    assert driver.shape() == [(1, 8), (2, 8)]
    assert driver.shape() == [(1, 1)]  # took the last free block; 2 wants one too and is the latest: it waits
    assert second.status is SequenceStatus.RUNNING
    assert driver.shape() == [(2, 1)]


def test_a_preempted_sequence_finds_its_own_blocks_if_nobody_took_them():
    """One block is taken of the second's three; the first two are there when it comes back."""
    driver = Driver(num_blocks=5, token_budget=64)
    driver.add(1, 8, new=3)
    second = driver.add(2, 12, new=2)
    assert driver.shape() == [(1, 8), (2, 12)]
    assert driver.shape() == [(1, 1)]
    assert (second.status, second.num_preemptions) == (SequenceStatus.WAITING, 1)
    assert driver.shape() == [(1, 1)]
    assert driver.shape() == [(2, 5)]


def test_the_oldest_is_never_preempted_and_the_others_are_first_in_their_turn():
    """Six sequences that can't all be held: each ends, in order of arrival, whatever was taken from it before."""
    driver = Driver(num_blocks=6, token_budget=64, prefix_cache=False)
    sequences = [driver.add(seq_id, 5, new=12) for seq_id in range(1, 7)]
    ended: list[int] = []
    while driver.open:
        oldest = min(driver.open)
        before = driver.open[oldest].num_preemptions
        computed = driver.open[oldest].num_output_tokens
        assert driver.shape()
        if oldest in driver.open:
            assert driver.open[oldest].num_preemptions == before
            assert driver.open[oldest].num_output_tokens == computed + 1
        ended += [s.seq_id for s in sequences if s.status is SequenceStatus.FINISHED and s.seq_id not in ended]
    assert ended == [1, 2, 3, 4, 5, 6]
    assert driver.scheduler.total_preemptions == sum(s.num_preemptions for s in sequences) > 1


def test_nobody_loses_blocks_to_a_later_arrival():
    driver = Driver(num_blocks=3, token_budget=64, num_groups=2)
    first = driver.add(1, 8, new=9)
    step = driver.step()
    driver.add(2, 4, new=9)
    driver.back(step)
    assert driver.shape() == [(1, 1)]
    assert first.num_computed_tokens == 9
    assert driver.open[2].status is SequenceStatus.WAITING


def test_a_sequence_in_a_step_in_flight_is_not_preempted():
    """Sequence 1 waits for the step that carries 2 rather than take blocks that a stage still writes."""
    driver = Driver(num_blocks=4, token_budget=64, num_groups=2)
    driver.add(1, 8)
    driver.add(2, 8)
    one, two = driver.step(), driver.step()
    assert [s.seq_id for step in (one, two) for s in step.slices] == [1, 2]
    driver.back(one)
    assert driver.step() is None
    assert driver.open[2].status is SequenceStatus.RUNNING
    driver.back(two)
    step = driver.step()
    assert [s.seq_id for s in step.slices] == [1]
    assert driver.open[2].status is SequenceStatus.WAITING


def test_running_sequences_are_shared_out_evenly_although_others_wait_for_room():
    driver = Driver(num_blocks=4, token_budget=64)
    for seq_id in range(1, 12):
        driver.add(seq_id, 2)
    assert len(driver.shape()) == 4
    driver.num_groups = 2
    steps = [driver.step(), driver.step()]
    assert [[s.seq_id for s in step.slices] for step in steps] == [[1, 2], [3, 4]]


def test_blocks_are_offered_for_reuse_when_their_step_is_back():
    driver = Driver(token_budget=64)
    driver.add(1, 8, first=100)
    step = driver.step()
    pool = driver.scheduler.pool
    assert pool.find_prefix(range(100, 109))[0] == []
    driver.back(step)
    assert len(pool.find_prefix(range(100, 109))[0]) == 2


def test_answers_to_one_prompt_compute_it_once():
    """The others wait for the first one's chunks, the one in flight and those after it, and compute the rest."""
    driver = Driver(token_budget=8, num_blocks=40)
    for seq_id in (1, 2, 3):
        driver.add(seq_id, 18, first=100)
    assert driver.shape() == [(1, 8)]
    assert driver.shape() == [(1, 8)]
    assert driver.shape() == [(1, 2), (2, 2), (3, 2)]
    assert driver.scheduler.total_cached_tokens == 32


def test_who_waits_for_anothers_block_holds_up_nobody_and_keeps_its_place():
    driver = Driver(token_budget=8)
    driver.add(1, 10, first=100)
    step = driver.step()
    driver.add(2, 10, first=100)
    driver.add(3, 3)
    driver.add(4, 3)
    driver.num_groups = 2
    late = driver.step()
    assert [s.seq_id for s in late.slices] == [3, 4]
    driver.back(step)
    driver.num_groups = 1
    assert [s.seq_id for s in driver.step().slices] == [1, 2]


def test_waiting_for_a_block_ends_with_the_sequence_that_computes_it():
    driver = Driver(token_budget=4, num_groups=2)
    driver.add(1, 12, first=100)
    step = driver.step()
    driver.add(2, 12, first=100)
    assert driver.step() is None
    driver.end(1)
    assert [(s.seq_id, s.start_position) for s in driver.step().slices] == [(2, 0)]
    driver.back(step)


def test_waiting_for_a_block_outlives_no_preemption():
    """The second computes what the third wants and loses its blocks to the first: both are done in the end."""
    driver = Driver(token_budget=4, num_blocks=5)
    driver.add(1, 7, new=9)
    while driver.open[1].num_output_tokens == 0:
        driver.shape()
    driver.add(2, 12, first=100, new=2)
    driver.add(3, 12, first=100, new=2)
    carried = [seq_id for _ in range(40) for seq_id, _ in driver.shape()]
    assert not driver.open
    assert carried.index(2) < carried.index(3)
    assert driver.scheduler.total_preemptions > 0


def test_without_the_prefix_cache_nobody_waits_for_a_block():
    driver = Driver(token_budget=32, prefix_cache=False)
    driver.add(1, 8, first=100)
    driver.add(2, 8, first=100)
    assert driver.shape() == [(1, 8), (2, 8)]


def test_the_last_block_of_a_prompt_is_not_worth_waiting_for():
    """Of eight tokens only the first four could be reused: with four there is nothing to wait for."""
    driver = Driver(token_budget=32)
    driver.add(1, 4, first=100)
    driver.add(2, 4, first=100)
    assert driver.shape() == [(1, 4), (2, 4)]


def test_a_step_looks_past_a_bounded_number_of_waiting_sequences():
    driver = Driver(token_budget=8, num_blocks=40)
    driver.add(1, 20, first=100)
    for seq_id in range(2, 80):
        driver.add(seq_id, 20, first=100)
    late = driver.add(80, 1)
    step = driver.step()
    assert [s.seq_id for s in step.slices] == [1]
    assert late.status is SequenceStatus.WAITING


def test_prompts_share_what_the_pace_allows_and_decodes_take_theirs_first():
    """Forty effective tokens beside one decode: the long prefix gets fewer of them, and a crumb is left."""
    asked: list[dict] = []

    def allowance(**values: int) -> PromptBudget:
        asked.append(values)
        return PromptBudget(ContextCost(((1000, 0.01),)), effective=60.0, tokens=values["tokens"])

    driver = Driver(token_budget=64, num_blocks=200)
    driver.add(1, 4)
    driver.shape()
    driver.add(2, 100)
    driver.allowance = allowance
    counts = [driver.shape() for _ in range(3)]
    assert [seq_id for seq_id, _ in counts[0]] == [1, 2]
    chunks = [count for shape in counts for seq_id, count in shape if seq_id == 2]
    assert 63 > chunks[0] > chunks[1] > chunks[2] >= LEAST_TOKENS
    assert asked[0] == {"num_decodes": 1, "num_steps": 1, "tokens": 63}


def test_a_step_without_allowance_for_a_waiting_prompt_leaves_it_waiting():
    driver = Driver(token_budget=64, num_blocks=200)
    driver.allowance = lambda **values: PromptBudget(ContextCost(), effective=20.0, tokens=values["tokens"])
    driver.add(1, 40)
    driver.add(2, 40)
    driver.add(3, 1)
    assert driver.shape() == [(1, 20)]
    assert driver.open[2].status is SequenceStatus.WAITING


def test_an_aborted_sequences_token_is_dropped():
    driver = Driver()
    sequence = driver.add(1, 3)
    step = driver.step()
    driver.end(1)
    assert driver.scheduler.pool.num_draining == 1
    driver.back(step)
    assert sequence.num_output_tokens == 0
    assert driver.scheduler.pool.num_free == 16


def test_restart_with_fewer_blocks_ends_what_can_not_be_held():
    driver = Driver(token_budget=64)
    driver.add(1, 20)
    driver.add(2, 6)
    driver.add(3, 7)
    driver.shape()
    ended = driver.scheduler.restart(2)
    verdicts = [(verdict.sequence.seq_id, verdict.reason) for verdict in ended]
    assert verdicts == [(1, FinishReason.ERROR), (3, FinishReason.LENGTH)]
    assert driver.shape() == [(2, 7)]


@pytest.mark.parametrize("num_groups", [1, 2, 5])
@given(data=st.data())
@hypothesis_settings(max_examples=40, deadline=None)
def test_every_sequence_ends_whatever_the_sizes_are(num_groups, data):
    """Any prompts, pools and budgets: no stall, no starvation, all blocks free at the end."""
    num_blocks = data.draw(st.integers(3, 20))
    driver = Driver(
        num_blocks=num_blocks,
        num_groups=num_groups,
        token_budget=data.draw(st.integers(1, 40)),
        max_running=data.draw(st.integers(1, 8)),
    )
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 4 * num_blocks), st.integers(1, 20)), max_size=8))
    for seq_id, (num_prompt, new) in enumerate(sizes, start=1):
        driver.add(seq_id, num_prompt, new=new, first=data.draw(st.sampled_from([0, 500])))
    in_flight: list[StepInput] = []
    for _ in range(20_000):
        while len(in_flight) < num_groups and (step := driver.step()) is not None:
            in_flight.append(step)
        if not in_flight:
            break
        driver.back(in_flight.pop(0))
    assert not driver.open
    assert driver.scheduler.pool.num_free == num_blocks


def test_steps_in_flight_share_out_decodes_and_prompts_each_for_itself():
    """Else one step would carry all decodes and another all prompts, and stages would wait for each other."""
    driver = Driver(token_budget=64, num_groups=1)
    for seq_id in (1, 2, 3, 4):
        driver.add(seq_id, 1)
    driver.back(driver.step())
    driver.num_groups = 2
    driver.add(5, 10)
    driver.add(6, 10)
    first, second = driver.step(), driver.step()
    carried = [[(part.seq_id, part.num_tokens) for part in step.slices] for step in (first, second)]
    assert carried == [[(1, 1), (2, 1), (5, 10)], [(3, 1), (4, 1), (6, 10)]]
