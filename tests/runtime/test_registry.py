"""The registry keeps every worker once, loses nothing, and never makes a broken file worse."""

import json
import subprocess
import sys
import threading

import pytest

from shardwright.errors import RegistryError
from shardwright.runtime import registry as registry_module
from shardwright.runtime.registry import Change, Registry, WorkerEntry


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "workers.json")


def entry(number=1, *, username=None):
    return WorkerEntry(username=username or f"worker{number}", ip=f"192.168.1.{100 + number}", port=50051)


def files_beside(registry):
    return [path.name for path in registry.path.parent.iterdir()]


def test_a_registry_without_a_file_is_empty(registry):
    assert registry.load() == ()


def test_workers_are_kept_in_the_order_they_came(registry):
    assert [registry.add(entry(n)) for n in (3, 1, 2)] == [Change.ADDED] * 3
    assert registry.load() == (entry(3), entry(1), entry(2))


def test_the_file_is_a_list_of_objects_that_people_can_read(registry):
    registry.add(entry(1))
    assert json.loads(registry.path.read_text()) == [{"username": "worker1", "ip": "192.168.1.101", "port": 50051}]
    assert registry.path.read_text().endswith("]\n")


def test_the_same_worker_twice_changes_nothing(registry):
    registry.add(entry(1))
    before = registry.path.stat()
    assert registry.add(entry(1)) is Change.UNCHANGED
    assert registry.path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_known_address_under_another_name_is_renamed_in_its_place(registry):
    registry.add(entry(1))
    registry.add(entry(2))
    assert registry.add(entry(1, username="upstairs")) is Change.RENAMED
    assert registry.load() == (entry(1, username="upstairs"), entry(2))


def test_two_workers_on_one_machine_differ_by_port(registry):
    registry.add(WorkerEntry(username="a", ip="10.0.0.1", port=50051))
    assert registry.add(WorkerEntry(username="a", ip="10.0.0.1", port=50052)) is Change.ADDED


def test_an_ipv6_address_stands_in_brackets_in_the_address():
    assert WorkerEntry(username="six", ip="fe80::1", port=7).address == "[fe80::1]:7"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1, column 1: not JSON"),
        ('[\n  {"username": "a",\n]', "line 3, column 1: not JSON"),
        ("{}", "must hold a list of workers, but holds a JSON object"),
        ("[3]", "entry 1: must be an object with username, ip, port, but is a JSON number"),
        ('[{"username": "a", "ip": "10.0.0.1"}]', "entry 1: lacks port"),
        ('[{"username": "a", "ip": "10.0.0.1", "port": 1, "gpu": 0}]', "entry 1: has unknown gpu"),
        ('[{"username": "a", "ip": "10.0.0.1", "port": "1"}]', "entry 1: port is '1'"),
        ('[{"username": "a", "ip": "10.0.0.1", "port": true}]', "entry 1: port is True"),
        ('[{"username": 5, "ip": "10.0.0.1", "port": 1}]', "entry 1: username is 5"),
    ],
)
def test_a_file_that_is_not_a_registry_is_named_and_left_alone(registry, text, says):
    registry.path.write_text(text)
    with pytest.raises(RegistryError, match=r"workers\.json: ") as caught:
        registry.load()
    assert says in str(caught.value)
    with pytest.raises(RegistryError):
        registry.add(entry(1))
    assert registry.path.read_text() == text
    assert files_beside(registry) == ["workers.json"]


def test_an_address_written_twice_by_hand_is_refused(registry):
    registry.path.write_text(json.dumps([entry(1).as_json(), entry(2).as_json(), entry(1).as_json()]))
    with pytest.raises(RegistryError, match=r"entries 1 and 3 are both 192\.168\.1\.101:50051"):
        registry.load()


def test_bytes_that_are_no_text_are_refused(registry):
    registry.path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RegistryError, match="not text in UTF-8"):
        registry.load()


def test_a_folder_in_the_files_place_is_refused(registry):
    registry.path.mkdir()
    with pytest.raises(RegistryError, match="can't be read: Is a directory"):
        registry.load()


@pytest.mark.parametrize("ip", ["192.168.1.999", "1.2.3", "", "a b", "-x", "host:50051", "http://x", "x" * 64, None])
def test_what_is_neither_address_nor_host_name_is_refused(ip):
    with pytest.raises(RegistryError, match="ip is"):
        WorkerEntry(username="a", ip=ip, port=1)


@pytest.mark.parametrize("ip", ["0.0.0.0", "::"])  # noqa: S104
def test_an_address_that_means_all_addresses_is_refused(ip):
    with pytest.raises(RegistryError, match="means every address"):
        WorkerEntry(username="a", ip=ip, port=1)


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "localhost", "gpu-box", "gpu.lab.example.org", "node_3"])
def test_addresses_and_host_names_are_taken(ip):
    assert WorkerEntry(username="a", ip=ip, port=1).ip == ip


@pytest.mark.parametrize("port", [0, -1, 65536, "50051", 1.5, None])
def test_a_port_out_of_range_is_refused(port):
    with pytest.raises(RegistryError, match="between 1 and 65535"):
        WorkerEntry(username="a", ip="10.0.0.1", port=port)


@pytest.mark.parametrize("username", ["", "  ", "a\nb", "x" * 65])
def test_a_username_that_would_break_a_table_is_refused(username):
    with pytest.raises(RegistryError, match="username is"):
        WorkerEntry(username=username, ip="10.0.0.1", port=1)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RegistryError, match=r"can't be locked for writing: No such file or directory"):
        Registry(tmp_path / "nowhere" / "workers.json").add(entry(1))


def test_a_failed_write_leaves_the_old_file_and_no_litter(registry, monkeypatch):
    registry.add(entry(1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry_module.os, "fsync", full)
    with pytest.raises(RegistryError, match="No space left on device; it was left as it was"):
        registry.add(entry(2))
    assert registry.load() == (entry(1),)
    assert files_beside(registry) == ["workers.json"]


def test_a_symbolic_link_and_the_files_mode_survive(registry, tmp_path):
    real = tmp_path / "real.json"
    real.write_text("[]")
    real.chmod(0o600)
    registry.path.symlink_to(real)
    registry.add(entry(1))
    assert registry.path.is_symlink()
    assert json.loads(real.read_text()) == [entry(1).as_json()]
    assert real.stat().st_mode & 0o777 == 0o600


def test_a_lock_that_is_never_let_go_is_told_after_the_time_limit(registry, monkeypatch):
    monkeypatch.setattr(registry_module, "LOCK_TIMEOUT_S", 0.1)
    with (
        registry_module._locked(registry.path),
        pytest.raises(RegistryError, match="another process has kept it locked"),
    ):
        registry.add(entry(1))
    assert registry.add(entry(1)) is Change.ADDED


def test_registering_from_many_threads_at_once_loses_nothing(registry):
    threads = [threading.Thread(target=registry.add, args=(entry(n),)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.ip for e in registry.load()) == sorted(entry(n).ip for n in range(24))
    assert files_beside(registry) == ["workers.json"]


def test_registering_from_several_processes_at_once_loses_nothing(registry):
    code = (
        "import sys; from pathlib import Path; from shardwright.runtime.registry import Registry, WorkerEntry\n"
        "for n in range(10): Registry(Path(sys.argv[1])).add("
        "WorkerEntry(username='w', ip=f'10.0.{sys.argv[2]}.{n + 1}', port=1))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(registry.path), str(p)]) for p in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(registry.load()) == 30
