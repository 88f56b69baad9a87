"""`shardwright grafana export`: what it writes, and what it leaves alone."""

import json
import os
import stat

import pytest


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_export_writes_dashboards_rules_and_settings_and_lists_them(run_cli, tmp_path):
    outcome = run_cli("grafana", "export", "out", "--master", "rack:8000", "--prometheus-url", "http://prom:9090")
    assert outcome.code == 0
    written = tree(tmp_path / "out")
    assert sorted(outcome.out.splitlines()) == sorted(f"out/{path}" for path in written)
    assert {path for path in written if path.endswith(".json")} == {
        f"dashboards/{name}.json" for name in ("overview", "worker", "latency", "capacity", "metrics-json")
    }
    assert "rack:8000" in written["prometheus/prometheus.yml"]
    assert "http://prom:9090" in written["provisioning/datasources/shardwright.yaml"]
    assert f"{len(written)} files written to out" in outcome.err


def test_files_can_be_read_by_another_user_as_containers_are(run_cli, tmp_path):
    run_cli("grafana", "export", "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & stat.S_IROTH


def test_a_second_export_writes_nothing(run_cli, tmp_path):
    run_cli("grafana", "export", "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    outcome = run_cli("grafana", "export", "out", "--json")
    answer = json.loads(outcome.out)
    assert (outcome.code, answer["written"], len(answer["unchanged"])) == (0, [], 10)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_a_changed_file_is_kept_and_nothing_else_is_written(run_cli, tmp_path):
    run_cli("grafana", "export", "out")
    mine = tmp_path / "out" / "prometheus" / "alerts.yaml"
    mine.write_text("mine")
    (tmp_path / "out" / "dashboards" / "worker.json").unlink()
    before = tree(tmp_path / "out")
    outcome = run_cli("grafana", "export", "out")
    assert (outcome.code, outcome.out) == (2, "")
    assert "prometheus/alerts.yaml; nothing was written" in outcome.err
    assert "--force" in outcome.err
    assert tree(tmp_path / "out") == before


def test_force_replaces_what_differs_and_tells_which(run_cli, tmp_path):
    run_cli("grafana", "export", "out")
    expected = tree(tmp_path / "out")
    (tmp_path / "out" / "prometheus" / "alerts.yaml").write_text("mine")
    outcome = run_cli("grafana", "export", "out", "--force", "--json")
    assert json.loads(outcome.out)["written"] == ["prometheus/alerts.yaml"]
    assert tree(tmp_path / "out") == expected


def test_files_that_are_not_of_the_export_stay(run_cli, tmp_path):
    (tmp_path / "out" / "dashboards").mkdir(parents=True)
    (tmp_path / "out" / "dashboards" / "mine.json").write_text("{}")
    assert run_cli("grafana", "export", "out").code == 0
    assert (tmp_path / "out" / "dashboards" / "mine.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--master", "rack", "--master is 'rack'; it must be host:port"),
        ("--master", "rack:", "host:port"),
        ("--master", "rack:eighty", "host:port"),
        ("--master", "rack:99999", "host:port"),
        ("--master", "ftp://rack:80", "host:port"),
        ("--master", "rack:8000/metrics", "without a path"),
        ("--master", "me:secret@rack:8000", "without a password"),
        ("--master", "[::1:8000", "host:port"),
        ("--prometheus-url", "prom:9090", "a URL like"),
        ("--prometheus-url", "http://", "a URL like"),
        ("--prometheus-url", "http://prom:9090/?x=1", "a URL like"),
        ("--ttft-objective-s", "0", "above 0"),
        ("--ttft-objective-s", "nan", "above 0"),
        ("--ttft-objective-s", "inf", "above 0"),
    ],
)
def test_what_can_not_be_meant_is_said_and_nothing_is_written(run_cli, tmp_path, option, value, says):
    outcome = run_cli("grafana", "export", "out", option, value)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {option} is ")
    assert says in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_master_behind_tls_and_one_with_an_ipv6_address_are_taken(run_cli, tmp_path):
    assert run_cli("grafana", "export", "tls", "--master", "https://rack:443").code == 0
    assert 'scheme: "https"' in (tmp_path / "tls/prometheus/prometheus.yml").read_text()
    assert run_cli("grafana", "export", "six", "--master", "[fd00::1]:8000").code == 0
    assert '"[fd00::1]:8000"' in (tmp_path / "six/prometheus/prometheus.yml").read_text()


def test_a_folder_that_can_not_be_made_is_said(run_cli, tmp_path):
    (tmp_path / "out").write_text("a file")
    outcome = run_cli("grafana", "export", "out")
    assert outcome.code == 2
    assert "out" in outcome.err
    assert "can't be written" in outcome.err


def test_a_write_that_fails_leaves_the_file_as_it_was(run_cli, tmp_path, monkeypatch):
    run_cli("grafana", "export", "out")
    (tmp_path / "out" / "prometheus" / "alerts.yaml").write_text("mine")
    before = tree(tmp_path / "out")

    def fail(_self, _target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.replace", fail)
    outcome = run_cli("grafana", "export", "out", "--force")
    assert outcome.code == 2
    assert os.strerror(28) in outcome.err
    assert tree(tmp_path / "out") == before
