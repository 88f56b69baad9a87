"""Workers' lives: each pair of state and fact is either in the table or a bug."""

import pytest
from conversation import assignment, heartbeat, joined

from shardwright.core.cluster import NEXT, Cluster, WorkerFact, WorkerStatus


def cluster_of(*worker_ids: str) -> Cluster:
    cluster = Cluster(heartbeat_timeout_s=10.0)
    for worker_id in worker_ids:
        cluster.join(joined(worker_id).capacity)
    return cluster


def test_a_life_from_joining_to_loss_and_back():
    cluster = cluster_of("a")
    worker = cluster.workers["a"]
    assert worker.status is WorkerStatus.JOINING
    cluster.assign(assignment())
    assert (worker.status, cluster.holders(), cluster.all_loaded()) == (WorkerStatus.LOADING, ["a"], False)
    cluster.loaded("a")
    assert (worker.status, cluster.all_loaded()) == (WorkerStatus.READY, True)
    assert cluster.lose("a", "gone")
    assert (worker.status, worker.lost_reason, cluster.holders()) == (WorkerStatus.LOST, "gone", [])
    assert cluster.usable() == []
    cluster.join(joined("a").capacity)
    assert (worker.status, worker.lost_reason) == (WorkerStatus.JOINING, "")
    cluster.check()


def test_loss_of_a_worker_without_a_stage_is_no_loss_to_the_pipeline():
    cluster = cluster_of("a")
    assert not cluster.lose("a", "gone")
    assert not cluster.lose("a", "gone again")
    assert not cluster.lose("nobody", "gone")
    assert cluster.workers["a"].lost_reason == "gone"


def test_a_fact_that_can_not_happen_is_a_bug():
    cluster = cluster_of("a")
    for impossible in (cluster.loaded, cluster.release):
        with pytest.raises(KeyError):
            impossible("a")
    cluster.assign(assignment())
    with pytest.raises(KeyError):
        cluster.join(joined("a").capacity)


def test_every_state_can_be_reached_and_left():
    assert {status for status, _ in NEXT} == set(WorkerStatus) == set(NEXT.values())
    assert {fact for _, fact in NEXT} == set(WorkerFact)
    lost = [fact for status, fact in NEXT if status is WorkerStatus.LOST]
    assert lost == [WorkerFact.JOINED], "a lost worker does nothing but join again"


def test_deadlines_run_from_the_last_heartbeat():
    cluster = cluster_of("a", "b")
    assert cluster.next_deadline() is None
    report = heartbeat("a").report
    assert cluster.hear("a", report, 1.0)
    assert cluster.hear("b", report, 3.0)
    assert cluster.next_deadline() == 11.0
    assert cluster.silent(10.9) == []
    assert cluster.silent(11.0) == ["a"]
    assert cluster.silent(13.0) == ["a", "b"]
    cluster.lose("a", "silent")
    assert cluster.next_deadline() == 13.0
    assert not cluster.hear("a", report, 12.0)
    assert not cluster.hear("nobody", report, 12.0)


def test_a_worker_that_joins_anew_is_unheard_until_its_first_heartbeat():
    cluster = cluster_of("a")
    cluster.hear("a", heartbeat("a").report, 1.0)
    cluster.join(joined("a").capacity)
    assert cluster.next_deadline() is None
    assert cluster.workers["a"].report is None
