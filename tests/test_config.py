"""Settings: flags over environment over file over defaults, and errors that name the place."""

import dataclasses
from pathlib import Path

import pytest

from shardwright.config import MasterConfig, ServeConfig, WorkerConfig, read_config
from shardwright.errors import ConfigError


def read(kind=MasterConfig, *, flags=None, environ=None, file=None):
    return read_config(kind, flags=flags or {}, environ=environ or {}, file=file)


@pytest.fixture
def settings(tmp_path):
    def write(text):
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return path

    return write


def test_without_anything_the_defaults_hold():
    assert read() == MasterConfig()
    assert read(WorkerConfig) == WorkerConfig()
    assert MasterConfig().model == "google/gemma-2b"
    assert read(ServeConfig) == ServeConfig()
    assert WorkerConfig().port == 50051
    assert (ServeConfig().host, ServeConfig().port) == ("127.0.0.1", 8000)


def test_a_flag_beats_the_environment_which_beats_the_file(settings):
    file = settings("[master]\nblock_size = 1\ntoken_budget = 1\nmax_running = 1\n")
    environ = {"SHARDWRIGHT_BLOCK_SIZE": "2", "SHARDWRIGHT_TOKEN_BUDGET": "2"}
    config = read(flags={"block_size": 3, "dtype": None}, environ=environ, file=file)
    assert (config.block_size, config.token_budget, config.max_running) == (3, 2, 1)
    assert config.dtype == "auto"


def test_one_file_serves_all_three(settings):
    file = settings("[master]\nmodel = 'm'\n[worker]\nport = 7\n[serve]\nport = 8\n")
    assert read(file=file).model == "m"
    assert read(WorkerConfig, file=file).port == 7
    assert read(ServeConfig, file=file).port == 8


def test_a_worker_and_the_http_server_have_variables_of_their_own():
    environ = {"SHARDWRIGHT_PORT": "7", "SHARDWRIGHT_SERVE_PORT": "8"}
    assert read(WorkerConfig, environ=environ).port == 7
    assert read(ServeConfig, environ=environ).port == 8


def test_every_setting_can_be_given_in_the_environment():
    samples = {"int": "7", "float": "2.5", "bool": "false", "str": "float16", "Path": "~/x"}
    special = {
        "kv_tokens": "16",
        "max_body_bytes": "4096",
        "otlp_endpoint": "http://[::1]:4317",
        "tool_style": "hermes",
        "offload": "nvme",
        "all_reduce": "gloo",
    }
    kinds = ((MasterConfig, "SHARDWRIGHT_"), (WorkerConfig, "SHARDWRIGHT_"), (ServeConfig, "SHARDWRIGHT_SERVE_"))
    for kind, prefix in kinds:
        for field in dataclasses.fields(kind):
            name = field.type if isinstance(field.type, str) else field.type.__name__
            value = special.get(field.name, samples[name.removesuffix(" | None")])
            config = read(kind, environ={f"{prefix}{field.name.upper()}": value})
            assert getattr(config, field.name) is not None


def test_the_history_is_beside_the_metrics_under_their_name():
    assert read(environ={"SHARDWRIGHT_METRICS": "/var/lib/cluster.json"}).metrics_log == Path("/var/lib/cluster.jsonl")
    assert read().metrics_log == Path("metrics.jsonl")
    environ = {"SHARDWRIGHT_METRICS": "all.jsonl"}
    with pytest.raises(ConfigError, match=r"'all.jsonl'; a file of that ending is for the history beside it"):
        read(environ=environ)
    assert read(environ=environ | {"SHARDWRIGHT_WRITE_HISTORY": "no"}).metrics == Path("all.jsonl")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tool_style": "morse"}, "tool_style is 'morse'; choose one of auto, none, hermes"),
        ({"head_timeout_s": "nan"}, "head_timeout_s is nan; it must be above 0 and at most 86400 seconds"),
        ({"shutdown_timeout_s": "-1"}, "shutdown_timeout_s is -1.0; it must be between 0 and 86400 seconds"),
        ({"max_body_bytes": "3"}, "max_body_bytes is 3; it must be between 1024"),
        ({"port": "70000"}, "port is 70000; it must be between 0 and 65535"),
    ],
)
def test_a_serve_setting_that_cannot_be_used_is_named_with_its_bound(values, says):
    with pytest.raises(ConfigError) as caught:
        read(ServeConfig, environ={f"SHARDWRIGHT_SERVE_{name.upper()}": value for name, value in values.items()})
    assert says in str(caught.value)


def test_a_path_may_begin_with_the_home_folder():
    assert read(environ={"SHARDWRIGHT_CACHE_DIR": "~/models"}).cache_dir == Path.home() / "models"


def test_traces_go_where_opentelemetrys_own_variables_say_unless_something_else_is_said(settings):
    common = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:1"}
    special = common | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://traces:2"}
    ours = {"SHARDWRIGHT_OTLP_ENDPOINT": "http://ours:3"}
    assert read(environ={}).otlp_endpoint == ""
    assert read(environ=common).otlp_endpoint == "http://all:1"
    assert read(WorkerConfig, environ=special).otlp_endpoint == "https://traces:2"
    file = settings("[master]\notlp_endpoint = 'http://file:4'")
    assert read(environ=special, file=file).otlp_endpoint == "http://file:4"
    assert read(environ=special | ours, file=file).otlp_endpoint == "http://ours:3"
    assert read(environ=special | {"SHARDWRIGHT_OTLP_ENDPOINT": ""}).otlp_endpoint == "", "switched off"
    assert not hasattr(read(ServeConfig, environ=special), "otlp_endpoint")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("TRUE", True), ("0", False), ("no", False)])
def test_switches_are_read_from_words(text, value):
    assert read(environ={"SHARDWRIGHT_PREFIX_CACHE": text}).prefix_cache is value


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"SHARDWRIGHT_BLOCK_SIZE": "many"}, "SHARDWRIGHT_BLOCK_SIZE is 'many'; it must be a whole number"),
        ({"SHARDWRIGHT_PREFIX_CACHE": "maybe"}, "SHARDWRIGHT_PREFIX_CACHE is 'maybe'; it must be true or false"),
        ({"SHARDWRIGHT_BLOCK_SIZE": "0"}, "block_size is 0; it must be between 1 and 1024"),
        ({"SHARDWRIGHT_MAX_WAITING": "-1"}, "max_waiting is -1; it must be between 0 and 1048576"),
        ({"SHARDWRIGHT_PROBE_INTERVAL_S": "-2"}, "probe_interval_s is -2.0; it must be 0 (never) or above"),
        ({"SHARDWRIGHT_KV_TOKENS": "3"}, "kv_tokens is 3; it must be at least 16"),
        ({"SHARDWRIGHT_DTYPE": "int8"}, "dtype is 'int8'; choose one of auto, float32, bfloat16, float16"),
        ({"SHARDWRIGHT_HEARTBEAT_INTERVAL_S": "0"}, "heartbeat_interval_s is 0.0; it must be above 0 seconds"),
        ({"SHARDWRIGHT_HEARTBEAT_TIMEOUT_S": "nan"}, "heartbeat_timeout_s is nan"),
        ({"SHARDWRIGHT_OTLP_ENDPOINT": "localhost:4317"}, "otlp_endpoint is 'localhost:4317'; it must be http://HOST"),
        ({"SHARDWRIGHT_OTLP_ENDPOINT": "http://here:port"}, "otlp_endpoint is 'http://here:port'; it must be"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "grpc://here:1"}, "otlp_endpoint is 'grpc://here:1'; it must be"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_bound(environ, says):
    with pytest.raises(ConfigError) as caught:
        read(environ=environ)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[master", "not valid TOML"),
        ("master = 3", "master must be a table"),
        ("[master]\nmodle = 'x'", r"\[master\] has no setting 'modle'; known: block_size, cache_dir"),
        ("[master]\nblock_size = 'x'", "master.block_size is 'x'"),
        ("[master]\nblock_size = true", "master.block_size is True"),
        ("[master]\nmodel = 3", "master.model is 3; it must be text"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_place(settings, text, says):
    with pytest.raises(ConfigError, match=rf"settings\.toml.*{says}"):
        read(file=settings(text))


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: can't be read: No such file"):
        read(file=tmp_path / "none.toml")


def test_a_config_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MasterConfig().model = "other"
