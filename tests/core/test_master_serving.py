"""Conversations with the master about what a server needs: setups, prompt scores, deadlines, a full queue, probes."""

import pytest
from conversation import COSTS, bring_up, joined, piece, ready_master, sampled, send, settings, steps, submit, tell

from shardwright.core.effects import DeployFailed, EmitPromptScores, EmitToken, Finish, SendStep
from shardwright.core.events import Abort, Deploy, Submit, Tick, TokensSampled, WorkerLost
from shardwright.core.master import MasterState
from shardwright.types import (
    FinishReason,
    PromptScores,
    SamplingParams,
    SequenceSetup,
    SequenceSlice,
    StopConditions,
    TokenOut,
    TokenRules,
    TokenScore,
)

PENALTIES = SamplingParams(frequency_penalty=0.5)
RULES = TokenRules(logit_bias=((3, 1.5),), min_new_tokens=2)


def ask(seq_id: int, prompt: tuple[int, ...], *, new: int = 4, **more: object) -> Submit:
    values = {"sampling": SamplingParams(), "stop": StopConditions(max_new_tokens=new)} | more
    return Submit(seq_id=seq_id, prompt=prompt, **values)


def only_slice(effects: list) -> SequenceSlice:
    (step,) = steps(effects)
    (part,) = step.slices
    return part


def setup(prompt: tuple[int, ...], output: tuple[int, ...] = (), rules: TokenRules = RULES) -> SequenceSetup:
    return SequenceSetup(num_prompt_tokens=len(prompt), tokens=prompt + output, rules=rules, stop_token_ids=frozenset())


def scored(number: int, seq_id: int, first: int, *tokens: int, sampled_token: int | None = None) -> TokensSampled:
    scores = tuple(TokenScore(token_id=token, logprob=-float(token)) for token in tokens)
    outs = () if sampled_token is None else (TokenOut(seq_id=seq_id, token_id=sampled_token, logprob=-1.0),)
    return TokensSampled(
        epoch=1,
        step=number,
        tokens=outs,
        prompt_scores=(PromptScores(seq_id=seq_id, first_position=first, scores=scores),),
    )


# --- setups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "rules"), [({"sampling": PENALTIES}, TokenRules()), ({"rules": RULES}, RULES)])
def test_a_setup_goes_with_the_first_slice_that_samples_and_only_with_it(more, rules):
    master = ready_master()
    prompt = tuple(range(1, 11))
    assert only_slice(tell(master, ask(1, prompt, **more))).setup is None
    assert only_slice(tell(master, sampled(2))).setup == setup(prompt, rules=rules)
    assert only_slice(tell(master, sampled(3, (1, 40)))).setup is None


def test_a_sequence_with_neither_penalties_nor_rules_has_no_setup_and_is_not_dropped():
    master = ready_master()
    assert only_slice(tell(master, ask(1, (5,), new=1))).setup is None
    tell(master, sampled(2, (1, 9)))
    assert steps(tell(master, ask(2, (6,))))[0].dropped == ()


def test_a_sequence_that_ends_is_dropped_by_the_next_step():
    master = ready_master()
    tell(master, ask(1, (5,), new=1, rules=RULES), ask(2, (6,)))
    (step,) = steps(tell(master, sampled(2, (1, 9))))
    assert step.dropped == (1,)
    assert steps(tell(master, sampled(3, (2, 9))))[0].dropped == ()


def test_an_aborted_sequence_is_dropped_although_its_setup_is_still_on_its_way():
    master = ready_master(max_steps_in_flight=2)
    tell(master, ask(1, (5,), rules=RULES), Abort(seq_id=1))
    assert steps(tell(master, ask(2, (6,))))[0].dropped == (1,)


def test_a_sequence_that_was_never_set_up_is_not_dropped():
    """Aborted in the queue, and aborted before the last chunk of its prompt."""
    master = ready_master(max_steps_in_flight=1)
    tell(master, ask(1, tuple(range(1, 12)), rules=RULES), ask(2, (6,), rules=RULES), Abort(seq_id=2))
    tell(master, Abort(seq_id=1), sampled(2))
    assert steps(tell(master, ask(3, (7,))))[0].dropped == ()


def test_a_new_pipelines_last_stage_is_told_all_again_and_told_to_forget_nothing():
    master = ready_master("a", "b", recover=True)
    tell(master, ask(1, (5, 6), rules=RULES), ask(2, (7,), rules=RULES), sampled(2, (1, 9)), Abort(seq_id=2))
    tell(master, WorkerLost(worker_id="b", reason="gone"))
    (step,) = steps(bring_up(master, epoch=2))
    assert step.dropped == ()
    assert step.slices[0].setup == setup((5, 6), (9,))


def test_a_preempted_sequence_is_dropped_and_set_up_again_with_all_its_tokens():
    """Three blocks: sequence 1 needs the third at its ninth token, and sequence 2 has it."""
    master = ready_master(max_kv_tokens=12, token_budget=12)
    tell(master, ask(1, tuple(range(1, 8)), new=4), ask(2, (5, 6), new=3, rules=RULES))
    seen = []
    (step,) = steps(tell(master, sampled(2, (1, 30))))
    while step is not None:
        seen += [(part.seq_id, part.token_ids, part.setup, step.dropped) for part in step.slices]
        answers = [(part.seq_id, 40 + part.context_length) for part in step.slices]
        step = next(iter(steps(tell(master, sampled(step.step, *answers)))), None)
    assert seen == [
        (1, (30,), None, ()),
        (2, (5, 6), setup((5, 6)), ()),
        (1, (48,), None, (2,)),
        (1, (49,), None, ()),
        (2, (5, 6, 42), setup((5, 6), (42,)), ()),
        (2, (43,), None, ()),
    ]
    assert master.snapshot().total_preemptions == 1
    assert steps(tell(master, ask(3, (1,))))[0].dropped == (2,)


def test_how_often_a_request_was_preempted_is_told_while_it_runs_and_at_its_end():
    master = ready_master(max_kv_tokens=12, token_budget=12)
    tell(master, ask(1, tuple(range(1, 8)), new=4), ask(2, (5, 6), new=3))
    effects = tell(master, sampled(2, (1, 30)))
    told, ends = set(), {}
    while (step := next(iter(steps(effects)), None)) is not None:
        effects = tell(master, sampled(step.step, *((part.seq_id, 40) for part in step.slices)))
        told.add((master.num_preemptions(1), master.num_preemptions(2)))
        ends |= {effect.seq_id: effect.num_preemptions for effect in effects if isinstance(effect, Finish)}
    assert told == {(0, 0), (0, 1)}, "and 0 again when it is over"
    assert ends == {1: 0, 2: 1}


# --- prompt scores ---------------------------------------------------------------------------------


def test_a_prompts_scores_come_in_order_and_before_its_first_token():
    master = ready_master(prompt_logprob_tokens=4)
    prompt = (1, 2, 3, 4, 5, 6)
    first = only_slice(tell(master, ask(1, prompt, num_prompt_logprobs=2)))
    assert (first.token_ids, first.num_prompt_logprobs, first.next_token_id) == ((1, 2, 3, 4), 2, 5)
    told = tell(master, scored(2, 1, 1, 2, 3, 4, 5))
    assert [score.token_id for score in told[0].scores] == [2, 3, 4, 5]
    last = only_slice(told)
    assert (last.token_ids, last.num_prompt_logprobs, last.next_token_id) == ((5, 6), 2, None)
    told = tell(master, scored(3, 1, 5, 6, sampled_token=9))
    assert [type(effect) for effect in told] == [EmitPromptScores, EmitToken, SendStep]
    assert told[0] == EmitPromptScores(seq_id=1, scores=(TokenScore(token_id=6, logprob=-6.0),))
    assert only_slice(told).num_prompt_logprobs is None


def test_a_prompt_of_one_token_has_no_scores():
    master = ready_master()
    part = only_slice(tell(master, ask(1, (5,), num_prompt_logprobs=0)))
    assert (part.num_prompt_logprobs, part.next_token_id) == (None, None)


def test_the_last_prompt_token_alone_scores_nothing():
    master = ready_master(prompt_logprob_tokens=2)
    tell(master, ask(1, (1, 2, 3), num_prompt_logprobs=0))
    part = only_slice(tell(master, scored(2, 1, 1, 2, 3)))
    assert (part.token_ids, part.num_prompt_logprobs) == ((3,), None)


def test_a_scored_prompt_reuses_no_prefix_but_offers_its_own():
    master = ready_master(token_budget=16)
    prompt = tuple(range(1, 10))
    tell(master, ask(1, prompt, new=1), sampled(2, (1, 50)))
    part = only_slice(tell(master, ask(2, prompt, new=1, num_prompt_logprobs=0)))
    assert part.start_position == 0
    tell(master, scored(3, 2, 1, *prompt[1:], sampled_token=50))
    assert only_slice(tell(master, ask(3, prompt, new=1))).start_position == 8
    snapshot = master.snapshot()
    assert (snapshot.total_prompt_tokens, snapshot.total_cached_tokens) == (27, 8)


def test_one_steps_rows_of_scores_are_bounded_and_who_needs_none_goes_on():
    master = ready_master(prompt_logprob_tokens=3, token_budget=16)
    tell(master, ask(1, (1, 2), new=1))
    tell(master, ask(2, (3, 4, 5, 6), num_prompt_logprobs=0), ask(3, (6, 7, 8), num_prompt_logprobs=0), ask(4, (9,)))
    (step,) = steps(tell(master, sampled(2, (1, 50))))
    assert [(s.seq_id, s.num_tokens, s.num_prompt_logprobs) for s in step.slices] == [(2, 3, 0), (4, 1, None)]


def test_scores_that_were_given_are_not_asked_for_again_after_a_recovery():
    """The rows before the first that lacks its score are computed in a slice of their own, which asks nothing."""
    master = ready_master("a", "b", recover=True, prompt_logprob_tokens=5)
    prompt = tuple(range(1, 9))
    tell(master, ask(1, prompt, num_prompt_logprobs=0), scored(2, 1, 1, *prompt[1:6]))
    tell(master, WorkerLost(worker_id="b", reason="gone"))
    part = only_slice(bring_up(master, epoch=2))
    assert (part.start_position, part.num_tokens, part.num_prompt_logprobs) == (0, 5, None)
    part = only_slice(tell(master, sampled(2, epoch=2)))
    assert (part.start_position, part.num_tokens, part.num_prompt_logprobs) == (5, 3, 0)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (sampled(2, (1, 9)), "prompt scores for sequences [], expected [1]"),
        (
            scored(2, 1, 2, 6, 7, sampled_token=9),
            "scores of 2 prompt tokens of sequence 1 from position 2, expected its 2 from position 1",
        ),
        (
            scored(2, 1, 1, 6, sampled_token=9),
            "scores of 1 prompt tokens of sequence 1 from position 1, expected its 2 from position 1",
        ),
        (
            scored(2, 1, 1, 6, 8, sampled_token=9),
            "scores of 2 prompt tokens of sequence 1 from position 1, expected its 2 from position 1",
        ),
    ],
)
def test_wrong_scores_break_the_protocol(answer, what):
    master = ready_master()
    tell(master, ask(1, (5, 6, 7), num_prompt_logprobs=0))
    assert DeployFailed(reason=f"worker a broke the protocol: step 2 came back with {what}") in tell(master, answer)


def test_more_alternatives_than_were_asked_for_break_the_protocol():
    master = ready_master()
    tell(master, ask(1, (5, 6), num_prompt_logprobs=1))
    score = TokenScore(token_id=6, logprob=-1.0, top=((6, -1.0), (7, -2.0)))
    answer = TokensSampled(
        epoch=1,
        step=2,
        tokens=(TokenOut(seq_id=1, token_id=9, logprob=-1.0),),
        prompt_scores=(PromptScores(seq_id=1, first_position=1, scores=(score,)),),
    )
    assert "more than 1 alternatives" in tell(master, answer)[-1].message


def test_scores_that_nobody_asked_for_break_the_protocol():
    master = ready_master()
    tell(master, ask(1, (5, 6)))
    assert "expected []" in tell(master, scored(2, 1, 1, 6, sampled_token=9))[-1].message


def test_a_tokens_likeliest_rivals_reach_the_client():
    master = ready_master()
    tell(master, ask(1, (5,), sampling=SamplingParams(num_top_logprobs=2)))
    top = ((9, -0.1), (8, -3.0))
    token = TokenOut(seq_id=1, token_id=9, logprob=-0.1, top=top)
    assert tell(master, TokensSampled(epoch=1, step=2, tokens=(token,)))[0].top == top


# --- deadlines -------------------------------------------------------------------------------------


def test_a_request_ends_at_its_deadline_and_says_how_far_it_came():
    master = ready_master(max_running=1)
    tell(master, ask(1, (5, 6), new=9, timeout_s=5.0), ask(2, (7,), timeout_s=4.0), now=1.0)
    tell(master, sampled(2, (1, 8)), now=2.0)
    assert master.next_deadline() == 5.0
    assert tell(master, Tick(), now=4.9) == []
    assert tell(master, Tick(), now=5.0) == [
        Finish(
            seq_id=2,
            reason=FinishReason.DEADLINE,
            message="the request's 4 s were over while it waited in the queue",
        )
    ]
    assert master.next_deadline() == 6.0
    assert tell(master, Tick(), now=6.5) == [
        Finish(
            seq_id=1,
            reason=FinishReason.DEADLINE,
            message="the request's 5 s were over after 1 of at most 9 new tokens",
        )
    ]
    assert master.next_deadline() is None
    assert master.snapshot().num_free_blocks == 15  # the step that uses its block is not back
    assert tell(master, sampled(3, (1, 8)), now=7.0) == []
    assert master.snapshot().num_free_blocks == 16


def test_a_deadline_within_a_prompt_tells_how_much_of_it_was_computed():
    master = ready_master()
    tell(master, ask(1, tuple(range(20)), timeout_s=1.0), sampled(2))
    assert tell(master, Tick(), now=1.0)[0].message == "the request's 1 s were over after 8 of its prompt's 20 tokens"


def test_a_deadline_that_has_passed_already_sends_no_step():
    master = ready_master()
    assert [type(effect) for effect in tell(master, ask(1, (5,), timeout_s=0.0))] == [Finish]


def test_a_request_that_is_over_has_no_deadline():
    master = ready_master()
    tell(master, ask(1, (5,), new=1, timeout_s=5.0), sampled(2, (1, 9)))
    assert master.next_deadline() is None
    assert tell(master, Tick(), now=9.0) == []


# --- the queue's bound -----------------------------------------------------------------------------


def test_a_full_queue_turns_requests_away_and_tells_when_to_come_again():
    master = ready_master(max_waiting=2, max_running=1)
    tell(master, submit(1, (5,)), submit(2, (6,)), submit(3, (7,)))
    (refused,) = tell(master, submit(4, (8,)))
    assert (refused.seq_id, refused.reason) == (4, FinishReason.REJECTED)
    assert refused.message == "the queue is full: 2 requests wait already; come again later"
    assert 1 <= refused.retry_after_s <= 60
    snapshot = master.snapshot()
    assert (snapshot.num_waiting, snapshot.max_waiting) == (2, 2)
    tell(master, Abort(seq_id=2))
    assert tell(master, submit(5, (9,))) == []


def test_a_request_that_can_never_be_served_is_no_matter_of_the_queue():
    master = ready_master(max_waiting=1, max_running=1)
    tell(master, submit(1, (5,)), submit(2, (6,)))
    assert tell(master, submit(3, ()))[0].reason is FinishReason.ERROR


def test_the_queue_is_bounded_before_there_is_a_pipeline_too():
    master = MasterState(settings(max_waiting=1), COSTS)
    assert tell(master, submit(1, (5,))) == []
    assert tell(master, submit(2, (6,)))[0].reason is FinishReason.REJECTED


def test_sequences_that_ran_already_do_not_count_as_waiting():
    """After a recovery both wait again, yet one more may come."""
    master = ready_master("a", "b", recover=True, max_waiting=1)
    tell(master, submit(1, (5,)), submit(2, (6,)), sampled(2, (1, 9)))
    tell(master, WorkerLost(worker_id="b", reason="gone"))
    assert master.snapshot().num_waiting == 2
    assert tell(master, submit(3, (7,))) == []
    assert tell(master, submit(4, (8,)))[0].reason is FinishReason.REJECTED


def test_the_time_to_come_again_follows_how_fast_requests_end():
    master = ready_master(max_waiting=1, max_running=1)
    for seq_id in range(1, 11):
        tell(master, submit(seq_id, (seq_id,), new=1), now=3.0 * seq_id)
        tell(master, sampled(1 + seq_id, (seq_id, 50)), now=3.0 * seq_id)
    tell(master, submit(11, (5,)), submit(12, (6,)), now=33.0)
    waits = [tell(master, submit(seq_id, (7,)), now=33.0)[0].retry_after_s for seq_id in range(13, 40)]
    assert waits[:3] == [3.0, 6.0, 9.0]
    assert waits[-1] == 60.0


# --- probes ----------------------------------------------------------------------------------------


def test_an_idle_pipeline_is_tried_again_and_again_with_a_block_of_the_masters_own():
    master = ready_master(probe_interval_s=5.0)
    assert master.snapshot().num_blocks == 16  # besides the probe's
    assert master.next_deadline() == 5.0
    assert tell(master, Tick(), now=4.9) == []
    assert tell(master, Tick(), now=5.0) == [send(2, piece(0, 0, (0,), (16,)))]
    assert master.next_deadline() is None
    assert master.snapshot().num_steps_in_flight == 1
    assert tell(master, sampled(2, (0, 9)), now=6.0) == []
    assert master.next_deadline() == 11.0


def test_no_probe_is_sent_while_steps_are_in_flight():
    master = ready_master(probe_interval_s=5.0)
    tell(master, submit(1, (5,), new=2), now=4.0)
    assert master.next_deadline() is None
    assert tell(master, Tick(), now=50.0) == []
    tell(master, sampled(2, (1, 9)), sampled(3, (1, 9)), now=51.0)
    assert master.next_deadline() == 56.0


def test_requests_run_beside_a_probe_and_its_answer_has_its_turn():
    master = ready_master(probe_interval_s=5.0)
    tell(master, Tick(), now=5.0)
    assert tell(master, submit(1, (5, 6)), now=5.1) == [send(3, piece(1, 0, (5, 6), (0,)))]
    wrong = tell(ready_master_with_probe_and_request(), sampled(3, (1, 9)), now=5.2)
    assert (
        DeployFailed(reason="worker a broke the protocol: step 3 came back with 1 tokens, expected step 2 with one")
        in wrong
    )
    assert tell(master, sampled(2, (0, 9)), now=5.2) == []
    assert tell(master, sampled(3, (1, 7)), now=5.3)[0] == EmitToken(seq_id=1, index=0, token_id=7, logprob=-1.0)


def ready_master_with_probe_and_request() -> MasterState:
    master = ready_master(probe_interval_s=5.0)
    tell(master, Tick(), submit(1, (5, 6)), now=5.0)
    return master


def test_a_probe_names_the_sequences_that_ended_before_it():
    master = ready_master(probe_interval_s=5.0)
    tell(master, ask(1, (5,), new=1, rules=RULES), sampled(2, (1, 9)))
    assert steps(tell(master, Tick(), now=5.0))[0].dropped == (1,)


def test_a_placement_without_room_for_the_probes_block_is_refused():
    """Just enough memory for the layers and one block of 4 positions, and for one more."""
    need = sum(COSTS.layer_bytes) + COSTS.embedding_bytes + COSTS.head_bytes
    block = 4 * sum(COSTS.layer_kv_bytes_per_token)
    for spare, probe_interval_s, fits in ((1, None, True), (1, 1.0, False), (2, 1.0, True)):
        master = MasterState(settings(probe_interval_s=probe_interval_s), COSTS)
        told = tell(master, joined("a", memory_bytes=need + spare * block), Deploy())
        assert any(isinstance(effect, DeployFailed) for effect in told) is not fits


def test_readiness_is_a_step_that_came_back_lately():
    master = MasterState(settings(probe_interval_s=5.0), COSTS)
    assert not master.is_ready(0.0)
    tell(master, joined("a"), Deploy())
    bring_up(master, now=100.0)
    assert master.is_ready(110.0)
    assert not master.is_ready(110.1)
    tell(master, Tick(), now=110.2)
    assert not master.is_ready(110.2)
    tell(master, sampled(2, (0, 9)), now=110.3)
    assert master.is_ready(120.0)


def test_a_step_that_is_overdue_ends_readiness_although_others_came_back():
    master = ready_master(max_steps_in_flight=2)
    tell(master, submit(1, (5,)), submit(2, (6,)), now=1.0)
    tell(master, sampled(2, (1, 9)), now=8.0)
    assert master.is_ready(11.0)
    assert not master.is_ready(11.1)
    tell(master, sampled(3, (2, 9)), now=12.0)
    assert master.is_ready(12.0)


def test_a_failed_pipeline_is_not_ready():
    master = ready_master("a")
    assert master.is_ready(1.0)
    tell(master, WorkerLost(worker_id="a", reason="gone"), now=1.0)
    assert not master.is_ready(1.0)
