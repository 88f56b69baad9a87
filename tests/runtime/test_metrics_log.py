"""The rows of the last hour on disk: appended, cut, gone on with, and disks that don't take them."""

import json
import logging
import resource

import pytest

from shardwright.runtime.metrics_log import MetricsLog

NOW = 1_767_225_600.0


def rows_at(*times):
    return [{"timestamp": time, "worker": worker, "busy_ratio": 0.5} for time in times for worker in ("a", "b")]


def times_in(path):
    """The file's timestamps; every line must be whole."""
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line)["timestamp"] for line in text.splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_rows_are_added_at_the_end_one_a_line(path):
    log = MetricsLog(path, kept_s=60.0)
    log.append(rows_at(NOW), now=NOW)
    log.append(rows_at(NOW + 5), now=NOW + 5)
    assert path.read_text(encoding="utf-8").splitlines() == [json.dumps(row) for row in rows_at(NOW, NOW + 5)]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_the_file_holds_what_is_kept_and_at_most_a_quarter_more(path):
    log = MetricsLog(path, kept_s=60.0)
    for index in range(100):
        now = NOW + 5 * index
        log.append(rows_at(now), now=now)
        times = times_in(path)
        assert times[0] >= now - 75.0
        assert times[0] <= max(now - 60.0, NOW), "nothing is cut off too soon"
        assert times == sorted(times)
        assert times[-1] == now
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_master_that_starts_goes_on_with_the_file(path):
    MetricsLog(path, kept_s=60.0).append(rows_at(NOW, NOW + 5), now=NOW + 5)
    log = MetricsLog(path, kept_s=60.0)
    assert [row["timestamp"] for row in log.read(now=NOW + 61)] == [NOW + 5, NOW + 5]
    log.append(rows_at(NOW + 61), now=NOW + 61)
    assert times_in(path) == [NOW, NOW, NOW + 5, NOW + 5, NOW + 61, NOW + 61]
    MetricsLog(path, kept_s=60.0).append(rows_at(NOW + 80), now=NOW + 80)
    assert times_in(path) == [NOW + 61, NOW + 61, NOW + 80, NOW + 80]


def test_a_file_that_is_all_too_old_is_emptied_of_it(path):
    MetricsLog(path, kept_s=60.0).append(rows_at(NOW), now=NOW)
    log = MetricsLog(path, kept_s=60.0)
    assert log.read(now=NOW + 9000) == []
    log.append([], now=NOW + 9000)
    assert times_in(path) == []
    log.append(rows_at(NOW + 9005), now=NOW + 9005)
    assert times_in(path) == [NOW + 9005] * 2


@pytest.mark.parametrize("torn", [b'{"timestamp": 17', b'{"timestamp": 17' + b"7" * 9000, b"\x00" * 5000])
def test_what_a_crash_left_half_written_is_cut_off_and_nothing_else(path, torn):
    MetricsLog(path, kept_s=60.0).append(rows_at(NOW), now=NOW)
    with path.open("ab") as stream:
        stream.write(torn)
    log = MetricsLog(path, kept_s=60.0)
    assert len(log.read(now=NOW)) == 2
    log.append(rows_at(NOW + 5), now=NOW + 5)
    assert times_in(path) == [NOW, NOW, NOW + 5, NOW + 5]


def test_a_file_that_is_one_torn_line_is_begun_anew(path):
    path.write_bytes(b'{"times')
    MetricsLog(path, kept_s=60.0).append(rows_at(NOW), now=NOW)
    assert times_in(path) == [NOW, NOW]


def test_lines_that_are_no_rows_are_passed_over(path):
    path.write_text('[]\nnot json\n{"timestamp": "late"}\n{"timestamp": NaN}\n{"timestamp": 1767225600.0}\n')
    log = MetricsLog(path, kept_s=60.0)
    assert [row["timestamp"] for row in log.read(now=NOW)] == [NOW]
    log.append(rows_at(NOW + 5), now=NOW + 5)
    assert path.read_text(encoding="utf-8").startswith("[]\nnot json\n"), "somebody else's lines harm nobody"


def test_a_missing_file_is_no_fault_while_there_is_nothing_to_write(path, caplog):
    log = MetricsLog(path, kept_s=60.0)
    assert log.read(now=NOW) == []
    log.append([], now=NOW)
    assert not path.exists()
    log.append(rows_at(NOW), now=NOW)
    path.unlink()
    log.append(rows_at(NOW + 5), now=NOW + 5)
    assert times_in(path) == [NOW + 5] * 2, "somebody deleted it: it is begun anew"
    assert caplog.records == []


@pytest.mark.parametrize("obstacle", ["missing folder", "a folder in its place"])
def test_a_file_that_cannot_be_kept_is_one_warning_until_it_works_again(tmp_path, caplog, obstacle):
    folder = tmp_path / "out"
    path = folder / "metrics.jsonl"
    if obstacle == "a folder in its place":
        path.mkdir(parents=True)
    log = MetricsLog(path, kept_s=60.0)
    with caplog.at_level(logging.WARNING):
        assert log.read(now=NOW) == []
        for index in range(3):
            log.append(rows_at(NOW + index), now=NOW + index)
        assert len(caplog.records) == 1
        assert str(path) in caplog.records[0].getMessage()
        if obstacle == "a folder in its place":
            path.rmdir()
        else:
            folder.mkdir()
        log.append(rows_at(NOW + 5), now=NOW + 5)
        assert times_in(path) == [NOW + 5] * 2
        path.unlink()
        folder.rmdir()
        log.append(rows_at(NOW + 6), now=NOW + 6)
    assert len(caplog.records) == 2


def test_a_full_disk_keeps_the_old_rows_whole_and_later_ones_go_on(path, caplog):
    """A limit on file sizes stands for a full disk: the write fails in the middle."""
    log = MetricsLog(path, kept_s=60.0)
    log.append(rows_at(NOW), now=NOW)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            log.append(rows_at(NOW + 5), now=NOW + 5)
            log.append(rows_at(NOW + 10), now=NOW + 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1
    assert path.read_bytes() == before
    log.append(rows_at(NOW + 15), now=NOW + 15)
    assert times_in(path) == [NOW, NOW, NOW + 15, NOW + 15]


def test_a_disk_that_is_full_while_the_file_is_cut_keeps_all_rows(path, caplog):
    log = MetricsLog(path, kept_s=60.0)
    for index in range(16):
        log.append(rows_at(NOW + 5 * index), now=NOW + 5 * index)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            log.append([], now=NOW + 90)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]
